"""`fader bench train`: how fast a training step is on this machine, beside bare loops over the same losses."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.command import numbers

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
    everything: Annotated[
        bool, typer.Option("--all", help="Every method's config for CelebA at batches of 32, 64, 256 and 1024: the whole matrix.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that everyone has; the median counts.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long a turn is.")] = 2.0,
    to: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.", metavar="FILE")] = None,
) -> None:
    """Images a second of a training step: the engine eager, captured and compiled, beside bare loops."""
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
    if to:
        to.write_text(json.dumps(found, indent=1) + "\n")
        typer.echo(f"wrote {to}")
    typer.echo("docs/performance.md says what these figures should be")


def _possible(cuda: bool) -> list[str]:
    return ["eager", "captured", "compiled", "bare", "bare bf16", "bare captured"] if cuda else ["eager", "bare"]


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
