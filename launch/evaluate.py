"""`fader evaluate RUN|MODEL… --judge JUDGE`: does it slide? Tables over a split, several models side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.command import main

if TYPE_CHECKING:
    from pipeline.evaluation import Report, Table
    from pipeline.registry import Model


def evaluate(
    models: Annotated[list[str], typer.Argument(help="runs, exports or models:/NAME@alias", metavar="RUN|MODEL...")],
    judge: Annotated[
        str | None, typer.Option(help="the judge's run, export or models:/NAME@alias; by default the model's own")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="a shard set; by default the one the model was trained on")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    limit: Annotated[int | None, typer.Option(help="use the first so many records of the split", min=1)] = None,
    tables: Annotated[
        str, typer.Option(help="swap, fidelity, leak, distribution, cost: joined by commas")
    ] = "swap,fidelity,leak,cost",
    inception: Annotated[Path | None, typer.Option(help="TorchScript network for the distribution table")] = None,
    classes: Annotated[
        str | None, typer.Option(help="classes of that table, as Smiling,Male+Young; by default each attribute alone")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="records encoded at a time", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU when there is one")] = "auto",
    threads: Annotated[int, typer.Option(help="decoding threads", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="of the bootstrap and of the probe")] = 0,
    report_page: Annotated[
        bool, typer.Option("--report", help="also a page with sweeps, best and worst cases and curves into RUN/report")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all reports here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="write the tables here")] = None,
) -> None:
    """Swap accuracy by attribute and direction, fidelity, leak and cost, judged on images the model has not seen."""
    from pipeline import evaluation, registry
    from pipeline.shards import ShardSet

    asked = tuple(name.strip() for name in tables.split(",") if name.strip())
    if report_page:
        _only_runs(models)
    loaded = [registry.load(source, own_judge=judge is None) for source in models]
    judged_tables = {"swap", "distribution"} & set(asked)
    seer = _judge(loaded, judge) if judged_tables else _named_judge(judge)
    path = data or _data_path(loaded[0])
    shards = ShardSet.open(path)
    records = shards.split(split)
    probe_split = shards.split("train") if "leak" in asked and any(_slides(model) for model in loaded) else None
    place = _device(device)
    reports = []
    for model in loaded:
        judged = f", judged by {seer.source}" if seer is not None and _slides(model) else ""
        count = min(limit or len(records), len(records))
        typer.echo(f"evaluating {model.source} on {count:,} records of the {split} split of {path}{judged}", err=True)
        with _progress() as progress:
            report = evaluation.evaluate(
                model,
                seer,
                records,
                batch_size=batch_size,
                device=place,
                limit=limit,
                tables=asked,
                seed=seed,
                probe_split=probe_split,
                inception=inception,
                classes=[names.split("+") for names in classes.split(",")] if classes else None,
                threads=threads,
                progress=progress,
            )
        trained_on = model.card.get("data_digest")
        if trained_on and trained_on != shards.digest:
            digests = f"digest {trained_on[:12]}, here {shards.digest[:12]}"
            report.warnings.append(f"it was trained on another data set ({digests})")
        reports.append(report)
    for table in evaluation.as_tables(reports):
        show(table)
    for report in reports:
        for warning in report.warnings:
            typer.echo(f"note: {report.model}: {warning}")
    written = []
    for model, report in zip(loaded, reports):
        files = _write_into_run(report)
        if report_page:
            typer.echo(f"drawing the report of {report.model}", err=True)
            run = Path(report.model)
            files.append(
                evaluation.page.write(
                    report,
                    model,
                    seer if _slides(model) else None,
                    records,
                    run / "report",
                    run=run,
                    device=place,
                    threads=threads,
                    batch_size=batch_size,
                )
            )
        _track(report, files)
        written += files
    if json_file:
        written.append(write(json_file, _json(reports)))
    if markdown_file:
        written.append(write(markdown_file, evaluation.markdown(reports)))
    for file in written:
        typer.echo(f"wrote {file}")
    typer.echo(_next(loaded))


def _slides(model: Model) -> bool:
    """Whether it is a model to be judged; a judge alone gets a table of its own accuracy."""
    from fader.method import Encodes

    return isinstance(model.method, Encodes)


def _named_judge(judge: str | None) -> Model | None:
    from pipeline import registry

    return registry.load(judge) if judge else None


def _judge(models: list[Model], judge: str | None) -> Model | None:
    """The judge of all models: the one named, else the first that a model brings or its config names.

    Raises:
        ValueError: there is none, and a model needs one.
    """
    sliding = [model for model in models if _slides(model)]
    if judge or not sliding:
        return _named_judge(judge) if sliding else None
    for model in sliding:
        if model.judge is not None:
            return model.judge
    raise ValueError(
        f"{sliding[0].source} names no judge to say whether attributes changed; "
        "train one ('fader train CONFIG' with method: {name: judge}) and name its run with --judge"
    )


def _config(model: Model) -> dict[str, Any]:
    return model.card.get("config") or {}


def _data_path(model: Model) -> Path:
    """The shard set the model was trained on, as its config names it.

    Raises:
        ValueError: the config names none, or it is not here.
    """
    named = (_config(model).get("data") or {}).get("path")
    if not named:
        raise ValueError(f"{model.source} does not say which data it was trained on; name a shard set with --data")
    if not Path(named).exists():
        raise ValueError(f"{model.source} was trained on {named}, which is not here; name a shard set with --data")
    return Path(named)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ValueError(f"device {name!r} is none of auto, cpu, cuda")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: torch sees no GPU here; take --device cpu")
    return name


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("records", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


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


def _write_into_run(report: Report) -> list[Path]:
    """RUN/report/evaluation-<split>.json and .md, when the model is a run; under a name of its own for part of a split."""
    run = Path(report.model)
    if not _is_run(report.model):
        return []
    part = f"-first-{report.records}" if report.records < report.split_records else ""
    stem = run / "report" / f"evaluation-{report.split}{part}"
    return [
        write(stem.with_name(f"{stem.name}.json"), _json([report])),
        write(stem.with_name(f"{stem.name}.md"), report.markdown()),
    ]


def _is_run(source: str) -> bool:
    return (Path(source) / "config.yaml").is_file()


def _only_runs(models: list[str]) -> None:
    """Raises ValueError unless every model is a run, into whose folder its report goes."""
    for source in models:
        if not _is_run(source):
            raise ValueError(f"--report writes into a run's folder, and {source} is none: name its run")


def _track(report: Report, files: list[Path]) -> None:
    """Add numbers and files to the run's MLflow run; those of a part of a split would pass for the whole there."""
    from pipeline import tracking

    if not files or report.records < report.split_records:
        return
    added = tracking.add(report.model, report.metrics(), report.images_seen or 0, files=files)
    if added is None:
        return
    if added.problem:
        typer.echo(f"note: {report.model}: its numbers wait in its spool: {added.problem}")
    else:
        typer.echo(f"added its numbers and files to MLflow run {added.run_id} in {added.uri}")


def _json(reports: list[Report]) -> str:
    """One report as an object, several as a list of them."""
    content = [report.to_dict() for report in reports]
    return json.dumps(content[0] if len(content) == 1 else content, indent=1, allow_nan=False) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    """Write a whole file or none: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
    return path


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
