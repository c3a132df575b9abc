"""`fader evaluate RUN|MODEL… --judge JUDGE`: does it slide? Tables over a split, several models side by side."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.command import LARGEST_SEED, main, show
from launch.progress import progress_bar
from launch.train import stop
from pipeline.files import write_whole

if TYPE_CHECKING:
    from pipeline.data.shards import ShardSet
    from pipeline.engine import Ranks
    from pipeline.evaluation import Report, Specification
    from pipeline.models import Model


def evaluate(
    models: Annotated[list[str], typer.Argument(help="RUN, RUN@best, RUN@images-N, exports, models:/…", metavar="RUN|MODEL...")],
    judge: Annotated[list[str] | None, typer.Option(help="joined by commas; by default the model's own, else a panel")] = None,
    judge_images: Annotated[int | None, typer.Option(min=1, help="length of training of a judge where there is none")] = None,
    data: Annotated[Path | None, typer.Option(help="a shard set; by default the one the model was trained on")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    limit: Annotated[int | None, typer.Option(help="use the first so many records of the split", min=1)] = None,
    tables: Annotated[str, typer.Option(help="of swap,error,fidelity,leak,distribution,cost")] = "swap,fidelity,leak,cost",
    checkpoint: Annotated[str, typer.Option(help="of runs: latest, best or images-N")] = "latest",
    raw: Annotated[bool, typer.Option("--raw", help="runs' weights as trained, not their moving averages")] = False,
    inception: Annotated[Path | None, typer.Option(help="TorchScript network for the distribution table")] = None,
    classes: Annotated[str | None, typer.Option(help="of that table, as Smiling,Male+Young; else each attribute alone")] = None,
    batch_size: Annotated[int, typer.Option(help="records encoded at a time", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU when there is one")] = "auto",
    threads: Annotated[int, typer.Option(help="decoding threads", min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="of the bootstrap and of the probe")] = 0,
    report_page: Annotated[bool, typer.Option("--report", help="also a page with sweeps, cases and curves")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all reports here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="write the tables here")] = None,
) -> None:
    """Swap accuracy by attribute and direction, fidelity, leak and cost, judged on images the model has not seen."""
    from pipeline.config import addresses
    from pipeline.evaluation import Specification

    specification = Specification(
        models=tuple(models), checkpoint=checkpoint, averaged=not raw, judges=addresses(",".join(judge or ())),
        judge_images=judge_images, data=data, split=split, limit=limit,
        tables=tuple(name.strip() for name in tables.split(",") if name.strip()), inception=inception,
        classes=tuple(tuple(names.split("+")) for names in classes.split(",")) if classes else (), seed=seed,
        batch_size=batch_size, device=device, threads=threads,
    )
    _evaluate(specification, report_page, json_file, markdown_file)


def _evaluate(specification: Specification, page: bool, json_file: Path | None, markdown_file: Path | None) -> None:
    from pipeline.engine import leave, open_ranks
    from pipeline.evaluation import keeping, makes_pictures, markdown

    if page:
        keeping.check_runs(specification.models)
    ranks = open_ranks(specification.device)
    if specification.device in ("auto", "cuda"):
        specification = dataclasses.replace(specification, device=str(ranks.device))
    models = specification.load()
    shards = specification.open(models[0])
    judges = find_judges(models, shards, specification, ranks)
    reports = [measure(model, judges, shards, specification, ranks) for model in models]
    leave()
    if not ranks.is_main:
        return
    written = []
    for model, report in zip(models, reports):
        written += keep(model, report, judges, shards, specification, page)
    if json_file:
        written.append(write_whole(json_file, keeping.as_json(reports)))
    if markdown_file:
        written.append(write_whole(markdown_file, markdown(reports)))
    show_reports(reports)
    for file in written:
        typer.echo(f"wrote {file}")
    slides = next((model for model in models if makes_pictures(model.method)), models[0])
    typer.echo(f"next: {next_command(slides)}")


def find_judges(models: list[Model], shards: ShardSet, specification: Specification, ranks: Ranks) -> tuple[Model, ...]:
    """Return the judges of the models, trained first where there are none; end the process where that is interrupted."""
    from pipeline.training.interruption import Interrupted
    from pipeline.training.judges import panel_of

    try:
        return panel_of(models, shards, specification, ranks)
    except Interrupted as stopped:
        stop(stopped, "the same command goes on with it")


def measure(model: Model, judges: Sequence[Model], shards: ShardSet, specification: Specification, ranks: Ranks) -> Report:
    """Return one model's report; the main rank says what it does and how far it is."""
    from pipeline import evaluation

    split = specification.split
    if ranks.is_main:
        names = " and ".join(judge.source for judge in judges)
        judged = f", judged by {names}" if names and evaluation.makes_pictures(model.method) else ""
        count = specification.records(len(shards.split(split)))
        typer.echo(f"evaluating {model.source} on {count:,} records of the {split} split of {shards.path}{judged}", err=True)
    with progress_bar("records") as progress:
        return evaluation.evaluate(model, judges, shards, specification, ranks, progress=progress)


def keep(
    model: Model, report: Report, judges: Sequence[Model], shards: ShardSet, specification: Specification, page: bool = False
) -> list[Path]:
    """Write a run's report and page, add them to its MLflow run, and say so; return the files."""
    from pipeline.evaluation import keeping

    files = keeping.keep(model, report, specification)
    if page:
        typer.echo(f"drawing the report of {report.model}", err=True)
        files.append(keeping.draw_page(model, report, judges, shards, specification))
    added = keeping.track(model, report, files)
    if added is not None and added.problem:
        typer.echo(f"note: {report.model}: its numbers wait in its spool: {added.problem}")
    elif added is not None:
        typer.echo(f"added its numbers and files to MLflow run {added.run_id} in {added.uri}")
    return files


def show_reports(reports: list[Report]) -> None:
    from pipeline.evaluation import as_tables

    for table in as_tables(reports):
        show(table)
    for report in reports:
        for warning in report.warnings:
            typer.echo(f"note: {report.model}: {warning}")


def next_command(model: Model) -> str:
    from pipeline.evaluation import makes_pictures

    if model.source.startswith("models:/") or not makes_pictures(model.method):
        return model.capabilities[0].next_command(model.source)
    return shlex.join(["fader", "register", model.source, "--name", "NAME"])


if __name__ == "__main__":
    main(evaluate)
