"""`fader evaluate RUN|MODEL… --judge JUDGE`: does it slide? Tables over a split, several models side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import judges
from launch.command import LARGEST_SEED, main
from launch.progress import progress_bar
from pipeline.files import write_whole

if TYPE_CHECKING:
    from pipeline.data.shards import ShardSet
    from pipeline.engine import Ranks
    from pipeline.evaluation import Report, Table
    from pipeline.models import Model


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="runs, RUN@best, RUN@images-N, exports or models:/NAME@alias", metavar="RUN|MODEL..."),
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            help="the judge's run, export or models:/NAME@alias; by default the model's own, "
            "else one that is trained on the same data and kept beside the run"
        ),
    ] = None,
    judge_images: Annotated[
        int | None, typer.Option(help="length of training of a judge where there is none; by default up to 120,000", min=1)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="a shard set; by default the one the model was trained on")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    limit: Annotated[int | None, typer.Option(help="use the first so many records of the split", min=1)] = None,
    tables: Annotated[
        str, typer.Option(help="swap, fidelity, leak, distribution, cost: joined by commas")
    ] = "swap,fidelity,leak,cost",
    checkpoint: Annotated[str, typer.Option(help="of runs: latest, best or images-N")] = "latest",
    raw: Annotated[bool, typer.Option("--raw", help="runs' weights as trained, not their moving averages")] = False,
    inception: Annotated[Path | None, typer.Option(help="TorchScript network for the distribution table")] = None,
    classes: Annotated[
        str | None, typer.Option(help="classes of that table, as Smiling,Male+Young; by default each attribute alone")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="records encoded at a time", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU when there is one")] = "auto",
    threads: Annotated[int, typer.Option(help="decoding threads", min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="of the bootstrap and of the probe")] = 0,
    report_page: Annotated[
        bool, typer.Option("--report", help="also a page with sweeps, best and worst cases and curves into RUN/report")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all reports here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="write the tables here")] = None,
) -> None:
    """Swap accuracy by attribute and direction, fidelity, leak and cost, judged on images the model has not seen."""
    from pipeline import models as registry
    from pipeline.data.shards import ShardSet
    from pipeline.engine import leave
    from pipeline.evaluation import markdown

    if report_page:
        _only_runs(models)
    ranks = open_ranks(device)
    loaded = [
        registry.load(source, checkpoint=checkpoint, ema=not raw, own_judge=judge is None) for source in models
    ]
    path = data or data_path(loaded[0])
    way = Way(
        shards=ShardSet.open(path),
        split=split,
        tables=tuple(name.strip() for name in tables.split(",") if name.strip()),
        ranks=ranks,
        device=str(ranks.device) if device in ("auto", "cuda") else device,
        limit=limit,
        inception=inception,
        classes=tuple(tuple(names.split("+")) for names in classes.split(",")) if classes else None,
        batch_size=batch_size,
        threads=threads,
        seed=seed,
    )
    seer = _seer(loaded, judge, path, judge_images, way)
    reports = [measure(model, seer, way) for model in loaded]
    leave()
    if not ranks.is_main:
        return
    _show_all(reports)
    written = [file for model, report in zip(loaded, reports) for file in keep(model, report, seer, way, report_page)]
    if json_file:
        written.append(write_whole(json_file, _json(reports)))
    if markdown_file:
        written.append(write_whole(markdown_file, markdown(reports)))
    for file in written:
        typer.echo(f"wrote {file}")
    typer.echo(_next(loaded))


def _show_all(reports: list[Report]) -> None:
    from pipeline.evaluation import as_tables

    for table in as_tables(reports):
        show(table)
    for report in reports:
        for warning in report.warnings:
            typer.echo(f"note: {report.model}: {warning}")


@dataclass(frozen=True)
class Way:
    """How models are evaluated: what of which records, by whom, with what."""

    shards: ShardSet
    split: str
    tables: tuple[str, ...]
    ranks: Ranks
    device: str = "cpu"
    limit: int | None = None
    inception: Path | None = None
    classes: tuple[tuple[str, ...], ...] | None = None
    batch_size: int = 64
    threads: int = 2
    seed: int = 0


def measure(model: Model, judge: Model | None, way: Way) -> Report:
    """One model's report, the same on every rank; all ranks call it together. The main rank says what it does."""
    from pipeline import evaluation

    records, ranks = way.shards.split(way.split), way.ranks
    if ranks.is_main:
        judged = f", judged by {judge.source}" if judge is not None and _slides(model) else ""
        count = min(way.limit or len(records), len(records))
        what = f"{count:,} records of the {way.split} split of {way.shards.path}"
        typer.echo(f"evaluating {model.source} on {what}{judged}", err=True)
    with progress_bar("records") as progress:
        report = evaluation.evaluate(
            model,
            judge,
            records,
            batch_size=way.batch_size,
            device=way.device,
            limit=way.limit,
            tables=way.tables,
            reduce_sum=ranks.reduce_sum,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=way.seed,
            probe_split=way.shards.split("train") if "leak" in way.tables and _slides(model) else None,
            inception=way.inception,
            classes=way.classes,
            threads=way.threads,
            progress=progress,
        )
    trained_on = model.card.get("data_digest")
    if trained_on and trained_on != way.shards.digest:
        digests = f"digest {trained_on[:12]}, here {way.shards.digest[:12]}"
        report.warnings.append(f"it was trained on another data set ({digests})")
    return report


def keep(model: Model, report: Report, judge: Model | None, way: Way, page: bool = False) -> list[Path]:
    """Write a run's report into its folder, with a page of its own where asked for, and add it to its MLflow run."""
    from pipeline import evaluation
    from pipeline.evaluation import USUAL_TABLES

    if model.run is None:
        return []
    tables = way.tables if _slides(model) else USUAL_TABLES
    name = f"evaluation-{report.split}{suffix(model.variant, tables, report.records, report.split_records)}"
    files = [
        write_whole(model.run / "report" / f"{name}.json", _json([report])),
        write_whole(model.run / "report" / f"{name}.md", report.markdown()),
    ]
    if page:
        typer.echo(f"drawing the report of {report.model}", err=True)
        files.append(
            evaluation.page.write(
                report,
                model,
                judge if _slides(model) else None,
                way.shards.split(way.split),
                model.run / "report",
                run=model.run,
                device=way.device,
                threads=way.threads,
                batch_size=way.batch_size,
                variant=model.variant,
            )
        )
    if report.records == report.split_records and not model.variant.endswith("-raw"):
        _track(model.run, report, files)
    return files


def suffix(variant: str, tables: Sequence[str], records: int, split_records: int) -> str:
    """What sets a report's files apart from those of all usual tables of the whole split by the run's newest weights."""
    from pipeline.evaluation import USUAL_TABLES

    part = "" if set(USUAL_TABLES) <= set(tables) else "-" + "-".join(sorted(tables))
    return variant + part + (f"-first-{records}" if records < split_records else "")


def open_ranks(device: str) -> Ranks:
    """The processes of this launch, on the device asked for.

    Raises:
        ValueError: there is no such device; one GPU for several ranks.
    """
    import torch

    from pipeline.engine import Ranks

    if device not in ("auto", "cpu", "cuda") and not device.startswith("cuda:"):
        raise ValueError(f"device {device!r} is none of auto, cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch sees no GPU here; take --device cpu")
    ranks = Ranks(cpu=device == "cpu")
    if device.startswith("cuda:") and ranks.world_size > 1:
        raise ValueError(f"device {device}: {ranks.world_size} ranks take a GPU each; say --device cuda")
    return ranks


def data_path(model: Model) -> Path:
    """The shard set the model was trained on, as its config names it.

    Raises:
        ValueError: the config names none, or it is not here.
    """
    named = ((model.card.get("config") or {}).get("data") or {}).get("path")
    if not named:
        raise ValueError(f"{model.source} does not say which data it was trained on; name a shard set with --data")
    if not Path(named).exists():
        raise ValueError(f"{model.source} was trained on {named}, which is not here; name a shard set with --data")
    return Path(named)


def _slides(model: Model) -> bool:
    """Whether it is a model to be judged; a judge alone gets a table of its own accuracy."""
    from fader.method import Encodes

    return isinstance(model.method, Encodes)


def _seer(
    models: list[Model], judge: str | None, data: Path, judge_images: int | None, way: Way
) -> Model | None:
    """The judge that the tables need, or that was named."""
    from pipeline import models as registry

    sliding = [model for model in models if _slides(model)]
    if sliding and {"swap", "distribution"} & set(way.tables):
        return judges.find(sliding, judge, data, judge_images, way.ranks)
    return registry.load(judge) if sliding and judge else None


def show(table: Table) -> None:
    """Draw a table in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    drawn = Drawn(title=table.title, caption=table.note, box=box.SIMPLE_HEAD)
    drawn.title_justify = drawn.caption_justify = "left"
    for i, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if i == 0 else "right")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def _only_runs(models: list[str]) -> None:
    """Raises ValueError unless every model is a run, into whose folder its report goes."""
    from pipeline.models import parse_source

    for source in models:
        if not (parse_source(source)[0] / "config.yaml").is_file():
            raise ValueError(f"--report writes into a run's folder, and {source} is none: name its run")


def _track(run: Path, report: Report, files: list[Path]) -> None:
    """Add numbers and files to the run's MLflow run; those of a part of a split would pass for the whole there."""
    from pipeline import tracking

    added = tracking.add(run, report.metrics(), report.images_seen or 0, files=files)
    if added is None:
        return
    if added.problem:
        typer.echo(f"note: {report.model}: its numbers wait in its spool: {added.problem}")
    else:
        typer.echo(f"added its numbers and files to MLflow run {added.run_id} in {added.uri}")


def _json(reports: list[Report]) -> str:
    """One report as an object, several as a list of them."""
    content: list[dict[str, Any]] = [report.to_dict() for report in reports]
    return json.dumps(content[0] if len(content) == 1 else content, indent=1, allow_nan=False) + "\n"


def _next(models: list[Model]) -> str:
    sliding = [model for model in models if _slides(model)]
    if not sliding:
        return f"next: fader train CONFIG judge={models[0].source}"
    source, name = sliding[0].source, sliding[0].attributes.names[0]
    if source.startswith("models:/"):
        return f"next: fader edit PHOTO --model {source} --set {name}=1.5 --out DIR"
    return f"next: fader register {source} --name NAME"


if __name__ == "__main__":
    main(evaluate)
