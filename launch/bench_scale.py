"""`fader bench scale`: what a training step would take on up to 1,024 GPUs, from this machine's step and given links."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench_train import attributes_of
from launch.command import numbers


def scale(
    path: Annotated[Path, typer.Argument(metavar="CONFIG")] = Path("configs/celeba_fader.yaml"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the experiment.", metavar="KEY=VALUE")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of one rank.")] = 32,
    step: Annotated[float | None, typer.Option(help="Milliseconds of a step on one GPU; by default measured here.")] = None,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    inside: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU sends to others of its node.")] = 450.0,
    between: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU sends to other nodes.")] = 50.0,
    latency: Annotated[float, typer.Option(min=0.0, help="Microseconds from one GPU to the next.")] = 10.0,
    processes: Annotated[str, typer.Option(help="Processes of this machine to check with, parted by commas; '' = none.")] = "2,4",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
    to: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.", metavar="FILE")] = None,
) -> None:
    """Weak scaling: every rank keeps its batch, and gradients and batch norm's sums travel."""
    from pipeline import config
    from pipeline.training import scaling

    checked = numbers(processes, "--processes") if processes else []
    experiment = config.load(path, set_ or [])
    attributes = attributes_of(experiment)
    loop, traffic = scaling.counting_loop(experiment, attributes, batch_size)
    computing = scaling.seconds_a_step(loop, steps) if step is None else step / 1000
    links = scaling.Links(per_node, inside * 1e9, between * 1e9, latency * 1e-6)
    rows = scaling.weak_scaling(traffic, computing, links, [2**power for power in range(11)])
    networks = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in traffic.networks.items())
    typer.echo(f"{path.stem}, batches of {batch_size} a rank, {computing * 1000:.1f} ms a step alone; {networks}")
    typer.echo(f"a step sums {sum(traffic.gradients) / 1e6:.1f} MB of gradients and {len(traffic.sums)} times something small")
    typer.echo("| ranks | gradients ms | sums ms | ms a step | images/s | of one rank |\n" + "|---" * 6 + "|")
    for row in rows:
        rate = row["ranks"] * batch_size / row["seconds"]
        times = " | ".join(f"{1000 * row[name]:.2f}" for name in ("gradients", "sums", "seconds"))
        typer.echo(f"| {row['ranks']} | {times} | {rate:,.0f} | {row['of_one']:.2f} |")
    checks: dict[int, Any] = {}
    for count in checked:
        found = checks[count] = scaling.check(experiment, attributes, batch_size, count, steps)
        parts = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in found.items())
        ratio = found["predicted"] / found["measured"]
        typer.echo(f"{count} processes of this CPU over gloo: {parts} (predicted / measured {ratio:.2f})")
    if to:
        about = {"config": path.stem, "batch_size": batch_size, "step": computing, "links": dataclasses.asdict(links)}
        figures = {**about, "traffic": dataclasses.asdict(traffic), "rows": rows, "checks": checks}
        to.write_text(json.dumps(figures, indent=1) + "\n")
        typer.echo(f"wrote {to}")
