"""`fader prepare`: a data set becomes WebDataset shards."""

import shlex
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.command import LARGEST_SEED, main, say_next
from launch.progress import progress_bar

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.data.shards import ShardSet

app = typer.Typer(
    help="Write a data set as WebDataset shards with a manifest. What is read may lie here, or at an address "
    "that fsspec knows (https://, s3://, …).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MOST_SHOWN = 10


@dataclass(frozen=True)
class Part:
    """Which part of the work this command does, and how. tasks: 0 when it does all of it."""

    task: int = 0
    tasks: int = 0
    finish: bool = False
    check: Literal["full", "header"] = "full"


_part: ContextVar[Part] = ContextVar("part", default=Part())


@app.callback()
def part(
    task: Annotated[int | None, typer.Option(min=0, help="Write this task's shards only, counted from 0.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks that share the work, on any machines.")] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Make one set of what all tasks wrote.")] = False,
    check: Annotated[Literal["full", "header"], typer.Option(help="full: decode pictures; header: look for their end.")] = "full",
) -> None:
    if (task is None) != (tasks is None):
        raise ValueError("--task and --tasks go together: 'fader prepare --task 2 --tasks 8 celeba SOURCE OUT'")
    if finish and tasks is not None:
        raise ValueError("--finish comes after the tasks, in a command of its own, without --task and --tasks")
    _part.set(Part(task or 0, tasks or 0, finish, check))

Out = Annotated[Path, typer.Argument(help="Folder for the shards: absent, empty, or one that an interrupted run left.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core, or threads for few records.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what is wrong and list it in dataset.json.")]
ShardRecords = Annotated[int, typer.Option(min=1, help="Records a tar.")]
Split = Annotated[str | None, typer.Option(help="Split anew, by a hash of the key: percent of train/valid/test, as 80/10/10.")]
Group = Annotated[str | None, typer.Option(help="Column whose equal values stand in one split: identity, camera.")]
Columns = Annotated[str, typer.Option(help="Columns to take as attributes, parted by commas; by default all others.")]
KindOf = Annotated[
    list[str] | None,
    typer.Option(
        help="What a column is where its cells do not say: NAME=binary, NAME=binary:ABSENT,PRESENT, NAME=k-way, "
        "NAME=k-way:FIRST,SECOND,THIRD, NAME=continuous:LOW:HIGH. '*' names all others. May be given several times."
    ),
]
SplitColumn = Annotated[str | None, typer.Option(help="Column that says train, valid or test.")]
KeyColumn = Annotated[str | None, typer.Option(help="Column that names the record.")]


@app.command()
def celeba(
    source: Annotated[str, typer.Argument(help="Folder of list_attr_celeba.txt, list_eval_partition.txt, img_align_celeba/.")],
    out: Out, workers: Workers = None, skip_bad: SkipBad = False, shard_records: ShardRecords = 4096,
) -> None:
    """CelebA as it is published."""
    _prepare("celeba", {"source": source}, out, workers, skip_bad, shard_records)


@app.command()
def mnist(
    source: Annotated[str, typer.Argument(help="Folder with the four idx files, gzipped or not.")], out: Out,
    attribute: Annotated[str, typer.Option(help="What to call the label.")] = "digit", split: Split = None,
    workers: Workers = None, shard_records: ShardRecords = 4096,
) -> None:
    """MNIST, and sets in its file format: one k-way attribute."""
    options = {"source": source, "attribute": attribute, "shares": split}
    _prepare("mnist", options, out, workers, False, shard_records)


@app.command()
def digits(out: Out, split: Split = None, workers: Workers = None, shard_records: ShardRecords = 4096) -> None:
    """scikit-learn's 1,797 handwritten digits; nothing is downloaded."""
    _prepare("digits", {"shares": split}, out, workers, False, shard_records)


@app.command()
def folders(
    source: Annotated[str, typer.Argument(help="Folder with trainA, trainB, testA, testB; or a folder a class.")], out: Out,
    attribute: Annotated[str | None, typer.Option(help="What to call it; by default the second class, or 'class'.")] = None,
    names: Annotated[str, typer.Option(help="What to call the classes, in the order of their folders: a,b.")] = "",
    split: Split = None, workers: Workers = None, skip_bad: SkipBad = False, shard_records: ShardRecords = 4096,
) -> None:
    """Pictures sorted into folders: two classes make a binary attribute, more a k-way one."""
    options = {"source": source, "attribute": attribute, "names": _parts(names), "shares": split}
    _prepare("folders", options, out, workers, skip_bad, shard_records)


@app.command()
def daynight(
    source: Annotated[str, typer.Argument(help="Folder with labels.csv (path, label, camera) or day/ and night/.")], out: Out,
    labels: Annotated[str, typer.Option(help="Column that says day or night.")] = "label",
    camera: Annotated[str | None, typer.Option(help="Column of cameras; by default one that is called so.")] = None,
    split: Split = None, workers: Workers = None, skip_bad: SkipBad = False, shard_records: ShardRecords = 4096,
) -> None:
    """Webcam photos by day and by night: no camera stands on both sides of a split, where cameras are known."""
    options = {"source": source, "labels": labels, "camera": camera, "shares": split}
    _prepare("daynight", options, out, workers, skip_bad, shard_records)


@app.command()
def table(
    source: Annotated[str, typer.Argument(help="CSV or Parquet file with a column of picture paths.")], out: Out,
    images: Annotated[str | None, typer.Option(help="Where the paths start; by default beside the file.")] = None,
    path: Annotated[str, typer.Option(help="Column of picture paths.")] = "path", key: KeyColumn = None,
    split_column: SplitColumn = None, group: Group = None, attributes: Columns = "", kind: KindOf = None, split: Split = None,
    workers: Workers = None, skip_bad: SkipBad = False, shard_records: ShardRecords = 4096,
) -> None:
    """Any CSV or Parquet file with a column of paths; binary, k-way and continuous attributes."""
    columns = {"key": key, "split": split_column, "group": group, "attributes": _parts(attributes), "kinds": kind or ()}
    options = {"source": source, "images": images, "path": path, **columns, "shares": split}
    _prepare("table", options, out, workers, skip_bad, shard_records)


@app.command()
def wds(
    source: Annotated[str, typer.Argument(help="Folder of WebDataset tars, or one tar; img2dataset's output.")], out: Out,
    key: KeyColumn = None, split_column: SplitColumn = None, group: Group = None, attributes: Columns = "", kind: KindOf = None,
    split: Split = None, workers: Workers = None, skip_bad: SkipBad = False, shard_records: ShardRecords = 4096,
) -> None:
    """WebDataset tars that exist already: a picture and a JSON file a record; fields of the JSON are the columns."""
    columns = {"key": key, "split": split_column, "group": group, "attributes": _parts(attributes), "kinds": kind or ()}
    _prepare("wds", {"source": source, **columns, "shares": split}, out, workers, skip_bad, shard_records)


Count = Annotated[int, typer.Option(min=10, help="Pictures to draw: 80% train, 10% valid, 10% test.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Another seed draws others.")]
Twins = Annotated[bool, typer.Option("--twins", help="Also draw valid and test with one attribute changed, for evaluate.")]


@app.command()
def faces(
    out: Out, count: Count = 10_000, seed: Seed = 0, twins: Twins = False, workers: Workers = None,
    shard_records: ShardRecords = 4096,
) -> None:
    """Drawn faces with known attributes; the pictures and their lists stay in OUT/source, in CelebA's file format."""
    _draw("faces", "celeba OUT/source", out, count, seed, twins, workers, shard_records)


@app.command()
def fruit(
    out: Out, count: Count = 4_000, seed: Seed = 0, twins: Twins = False, workers: Workers = None,
    shard_records: ShardRecords = 4096,
) -> None:
    """Drawn apples and oranges; the pictures stay in OUT/source/pictures, a folder each."""
    _draw("fruit", "folders OUT/source/pictures", out, count, seed, twins, workers, shard_records)


def _draw(
    name: str, instead: str, out: Path, count: int, seed: int, twins: bool, workers: int | None, shard_records: int
) -> None:
    from pipeline.data.datasets import DATASETS
    from pipeline.data.datasets.twins import keep_twins

    if _part.get() != Part():
        raise ValueError(f"{name} are drawn by one command; what it drew can be cut up then: fader prepare {instead}")

    def draw() -> "Dataset":
        with progress_bar(f"drawing {name}") as progress:
            drawn = DATASETS[name](out / "source", count=count, seed=seed, workers=workers, progress=progress)
        if twins:
            with progress_bar("drawing twins") as progress:
                keep_twins(out / "source", drawn, seed, workers, progress)
        return drawn

    _write(draw, out, workers, False, shard_records)


@app.command()
def upload(
    source: Annotated[Path, typer.Argument(help="Folder of a finished shard set.")],
    address: Annotated[str, typer.Argument(help="Where to copy it, as fsspec knows it: s3://bucket/name, gs://…")],
) -> None:
    """Copy a finished shard set to an address; data.path of a config may name it, and tars are fetched when needed."""
    from pipeline.data import shards

    shards.upload(source, address)
    typer.echo(f"{source} lies at {address} now")
    say_next("train", "CONFIG", f"data.path={address}")


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _prepare(name: str, options: dict[str, Any], out: Path, workers: int | None, skip_bad: bool, shard_records: int) -> None:
    from pipeline.data.datasets import DATASETS, Shares

    if options.get("shares"):
        options["shares"] = Shares.parse(options["shares"])
    _write(lambda: DATASETS[name](**options, skip_bad=skip_bad), out, workers, skip_bad, shard_records)


def _write(read: Callable[[], "Dataset"], out: Path, workers: int | None, skip_bad: bool, shard_records: int) -> None:
    from pipeline.data import shards

    part = _part.get()
    try:
        dataset = read()
        typer.echo(f"{dataset.name}: {len(dataset):,} records to {out}, {shard_records:,} a shard")
        for entry in dataset.attribute_list if len(dataset.attribute_list) <= _MOST_SHOWN else ():
            values = ": " + ", ".join(entry["categories"]) if entry["categories"] else ""
            typer.echo(f"  {entry['name']}, {entry['kind']}{values}")
        if "split" in dataset.source:
            typer.echo(f"  split {dataset.source['split']}")
        with progress_bar("writing shards") as progress:
            options = {"shard_records": shard_records, "workers": workers, "skip_bad": skip_bad, "progress": progress}
            if part.tasks:
                names = shards.write_part(dataset, out, part.task, part.tasks, check=part.check, **options)
            elif part.finish:
                written = shards.finish(dataset, out, **options)
            else:
                written = shards.prepare(dataset, out, check=part.check, **options)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on where it stopped: {_again()}", err=True)
        raise
    if part.tasks:
        typer.echo(f"task {part.task} of {part.tasks} wrote {len(names):,} shards: {_few(names)}")
        typer.echo("when all tasks are done: the same command with --finish in place of --task and --tasks")
    else:
        _tell(written)


def _again() -> str:
    command = sys.argv[0] if sys.argv[0].startswith("fader ") else "python -m launch.prepare"
    return f"{command} {shlex.join(sys.argv[1:])}"


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_SHOWN else f"{names[0]} … {names[-1]}"


def _tell(written: "ShardSet") -> None:
    info = written.info
    counts = ", ".join(f"{name} {split['records']:,}" for name, split in info["splits"].items())
    typer.echo(f"{written.path} is complete: {counts}; data digest {written.digest[:16]}")
    if info["left_out"]:
        first, where = info["left_out"][0]["reason"], written.path / "dataset.json"
        typer.echo(f"left out: {len(info['left_out']):,}, listed in {where}; the first: {first}")
    say_next("inspect", written.path)
    say_next("verify", written.path)


if __name__ == "__main__":
    main(app)
