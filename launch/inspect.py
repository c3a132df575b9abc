"""`fader inspect`: what a shard set holds, in text and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.command import LARGEST_SEED, main

if TYPE_CHECKING:
    from pipeline.data.inspection import Inspection


def inspect(
    out: Annotated[Path, typer.Argument(help="Folder of a finished shard set.")],
    to: Annotated[Path | None, typer.Option(help="Folder for what it writes; OUT/inspect by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="another one shows other records")] = 0,
    log: Annotated[str | None, typer.Option(help="MLflow experiment to log it to.", metavar="EXPERIMENT")] = None,
) -> None:
    """Counts, balance, co-occurrence, sizes, JPEG quality, duplicates and a contact sheet of a shard set."""
    from pipeline.data import inspection

    to = to or out / "inspect"
    found = inspection.inspect(out, seed=seed)
    typer.echo(found.text)
    to.mkdir(parents=True, exist_ok=True)
    (to / "inspect.txt").write_text(found.text + "\n", encoding="utf-8")
    for name, png in found.pictures.items():
        (to / f"{name}.png").write_bytes(png)
    if log:
        _log(found, to, log, out)
    typer.echo(f"\nwrote {', '.join(f'{name}.png' for name in found.pictures)} and inspect.txt to {to}")
    typer.echo("next: write a config whose data.path is this folder (docs/data.md), then fader train CONFIG")


def _log(found: Inspection, to: Path, experiment: str, out: Path) -> None:
    from pipeline import tracking

    tracker = tracking.open_tracker(True, to, experiment, f"inspect {out.name}", True)
    tracker.start()
    tracker.log(found.metrics, 0, 0)
    for name, png in found.pictures.items():
        tracker.picture(name, png, 0)
    tracker.artifact(to / "inspect.txt")
    tracker.finish("FINISHED")


if __name__ == "__main__":
    main(inspect)
