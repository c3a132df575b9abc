"""`fader inspect`: what a shard set holds, in text and pictures."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.command import LARGEST_SEED, main, say_next

if TYPE_CHECKING:
    from pipeline.data.inspection import Inspection


def inspect(
    out: Annotated[str, typer.Argument(help="Folder or address of a finished shard set.")],
    to: Annotated[Path | None, typer.Option(help="Folder for what it writes; OUT/inspect, or inspect-OUT here.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="another one shows other records")] = 0,
    log: Annotated[str | None, typer.Option(help="MLflow experiment to log it to.", metavar="EXPERIMENT")] = None,
) -> None:
    """Counts, balance, co-occurrence, sizes, JPEG quality, duplicates and a contact sheet of a shard set."""
    from pipeline.data import inspection
    from pipeline.data.shards import ShardSet
    from pipeline.files import write_whole

    whole = ShardSet.open(out)
    name = out.rstrip("/").rpartition("/")[2]
    to = _writable(to) if to else _folder_for(whole.path, name, local=whole.remote is None)
    report = inspection.inspect(whole, seed=seed)
    write_whole(to / "inspect.txt", report.text + "\n", durable=False)
    for picture, png in report.pictures.items():
        write_whole(to / f"{picture}.png", png, durable=False)
    typer.echo(report.text)
    if log:
        _log(report, to, log, name)
    typer.echo(f"\nwrote {', '.join(f'{picture}.png' for picture in report.pictures)} and inspect.txt to {to}")
    say_next("train", "CONFIG", f"data.path={out}")


def _folder_for(whole: Path, name: str, local: bool) -> Path:
    """The set's own folder `inspect`, or a folder here where the set cannot be written to."""
    if local:
        try:
            return _writable(whole / "inspect")
        except ValueError:
            pass
    return _writable(Path(f"inspect-{name}"))


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}; name another folder with --to") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; name another folder with --to")
    return folder


def _log(report: "Inspection", to: Path, experiment: str, name: str) -> None:
    from pipeline import tracking

    tracker = tracking.open_tracker(True, to, experiment, f"inspect {name}", True)
    tracker.start()
    tracker.log(report.metrics, 0, 0)
    for picture, png in report.pictures.items():
        tracker.picture(picture, png, 0)
    tracker.artifact(to / "inspect.txt")
    tracker.finish("FINISHED")


if __name__ == "__main__":
    main(inspect)
