"""`fader bench train`, `fader bench scale`: how fast a training step is here, and would be on up to 1,024 GPUs."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.command import numbers, write_figures

if TYPE_CHECKING:
    from fader.attributes import Attributes
    from pipeline.config import Experiment
    from pipeline.training.throughput import Speed

MATRIX = [f"celeba_{name}" for name in "fader sharp judge residual_judge cgan icgan vacgan cvae vaegan aligner".split()]
FOUR = ("Male", "Smiling", "Eyeglasses", "Mouth_Slightly_Open")
HEAD = ("", "images/s", "ms a step", "of bare", "kernels", "device busy", "TFLOP/s", "of matrix rate", "of copy rate", "peak GiB")


def attributes_of(experiment: Experiment) -> Attributes:
    """Return what a set would have; there is none here, so four attributes stand for whatever it has."""
    from fader.attributes import Attribute, Attributes

    names = experiment.data.attributes
    return Attributes([Attribute(name) for name in (FOUR if names == ("*",) else names)])


def train(
    configs: Annotated[list[Path] | None, typer.Argument(help="By default configs/celeba_fader.yaml.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the experiment.", metavar="KEY=VALUE")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Parted by commas.")] = "32",
    ways: Annotated[str, typer.Option(help="Parted by commas; by default all that this machine can run.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every config for CelebA at batches of 32, 64, 256, 1024.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that everyone has; the median counts.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long a turn is.")] = 2.0,
    to: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.", metavar="FILE")] = None,
) -> None:
    """Images a second of a training step: the engine eager, captured, padded and compiled, beside bare loops."""
    import torch

    from pipeline import config
    from pipeline.loading.throughput import machine
    from pipeline.training import throughput

    cuda = torch.cuda.is_available()
    wanted = [way.strip() for way in ways.split(",") if way.strip()] or _possible(cuda)
    names = [Path("configs") / f"{name}.yaml" for name in MATRIX] if everything else [Path("configs/celeba_fader.yaml")]
    sizes = [32, 64, 256, 1024] if everything else numbers(batch_sizes, "--batch-sizes")
    found: dict[str, Any] = {"machine": machine(), "command": ["fader", "bench", *sys.argv[1:]], "rows": []}
    for path in configs or names:
        experiment = config.load(path, set_ or [])
        attributes = attributes_of(experiment)
        rate, bandwidth = throughput.ceilings(experiment.precision)
        for size in sizes:
            speeds = throughput.measure(experiment, attributes, size, wanted, rounds, seconds)
            side = experiment.data.image_size
            typer.echo(
                f"\n{path.stem}, {side}×{side}, {experiment.precision}, {len(attributes)} attributes, batches of {size}; "
                f"matrix product {rate / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s"
            )
            typer.echo("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
            for way, speed in speeds.items():
                typer.echo(_row(way, speed, speeds, size, rate, bandwidth))
                row = {"config": path.stem, "batch_size": size, "way": way, "precision": experiment.precision}
                found["rows"].append({**row, **dataclasses.asdict(speed)})
    write_figures(to, found)
    typer.echo("docs/performance.md says what these figures should be")


def _possible(cuda: bool) -> list[str]:
    return ["eager", "captured", "padded", "compiled", "bare", "bare bf16", "bare captured"] if cuda else ["eager", "bare"]


def _row(way: str, speed: Speed, speeds: dict[str, Speed], size: int, rate: float, bandwidth: float) -> str:
    images = statistics.median(speed.images_per_second)
    steps = images / size
    bare = speeds.get("bare")
    ratio = ""
    if bare is not None:
        ratio = f"{statistics.median(a / b for a, b in zip(speed.images_per_second, bare.images_per_second)):.2f}"
    busy = "" if speed.device_share is None else f"{speed.device_share:.0%}"
    peak = "" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**30:.2f}"
    shares = f"{steps * speed.flops / 1e12:.3f} | {steps * speed.flops / rate:.0%} | {steps * speed.bytes / bandwidth:.0%}"
    return f"| {way} | {images:,.0f} | {1000 / steps:.2f} | {ratio} | {speed.kernels} | {busy} | {shares} | {peak} |"


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
    about = {"config": path.stem, "batch_size": batch_size, "step": computing, "links": dataclasses.asdict(links)}
    write_figures(to, {**about, "traffic": dataclasses.asdict(traffic), "rows": rows, "checks": checks})
