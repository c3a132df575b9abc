"""`fader prepare`: a data set becomes WebDataset shards."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.command import main

if TYPE_CHECKING:
    from pipeline.datasets import Dataset
    from pipeline.shards import ShardSet
    from pipeline.datasets.workers import Progress

app = typer.Typer(
    help="Write a data set as WebDataset shards with a manifest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Argument(help="Folder for the shards: absent, empty, or one that an interrupted run left.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what is wrong and list it in dataset.json.")]
ShardRecords = Annotated[int, typer.Option(min=1, help="Records a tar.")]


@app.command()
def celeba(
    source: Annotated[
        Path, typer.Argument(help="Folder with list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba/.")
    ],
    out: Out,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    shard_records: ShardRecords = 4096,
) -> None:
    """CelebA as it is published."""
    from pipeline.datasets import DATASETS

    _prepare(lambda: DATASETS["celeba"](source, skip_bad=skip_bad), out, workers, skip_bad, shard_records)


@app.command()
def faces(
    out: Out,
    count: Annotated[int, typer.Option(min=10, help="Faces to draw: 80% train, 10% valid, 10% test.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed draws other people.")] = 0,
    workers: Workers = None,
    shard_records: ShardRecords = 4096,
) -> None:
    """Drawn faces with known attributes; the pictures and their lists stay in OUT/source, in CelebA's file format."""
    from pipeline.datasets import DATASETS

    def draw() -> Dataset:
        with progress_bar("drawing faces") as progress:
            return DATASETS["faces"](out / "source", count=count, seed=seed, workers=workers, progress=progress)

    _prepare(draw, out, workers, False, shard_records)


def _prepare(read: Callable[[], Dataset], out: Path, workers: int | None, skip_bad: bool, shard_records: int) -> None:
    from pipeline import shards

    try:
        dataset = read()
        typer.echo(f"{dataset.name}: {len(dataset):,} records to {out}, {shard_records:,} a shard")
        with progress_bar("writing shards") as progress:
            written = shards.prepare(
                dataset, out, shard_records=shard_records, workers=workers, skip_bad=skip_bad, progress=progress
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on where it stopped: {_again()}", err=True)
        raise
    _tell(written)


def _again() -> str:
    command = sys.argv[0] if sys.argv[0].startswith("fader ") else "python -m launch.prepare"
    return f"{command} {shlex.join(sys.argv[1:])}"


def _tell(written: ShardSet) -> None:
    info = written.info
    counts = ", ".join(f"{name} {split['records']:,}" for name, split in info["splits"].items())
    typer.echo(f"{written.path} is complete: {counts}; data digest {written.digest[:16]}")
    if info["left_out"]:
        first, where = info["left_out"][0]["reason"], written.path / "dataset.json"
        typer.echo(f"left out: {len(info['left_out']):,}, listed in {where}; the first: {first}")
    typer.echo(f"next: fader verify {written.path}")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A progress bar on stderr, with rate and time left; nothing when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, rate="")

        def progress(done: int, total: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield progress


if __name__ == "__main__":
    main(app)
