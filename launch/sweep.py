"""`fader sweep CONFIG key=value,value,… …`: one experiment at every point of a grid, evaluated and set side by side."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.command import main, say_next, show
from launch.progress import progress_bar, watching_training
from launch.train import stop
from pipeline.files import write_whole

if TYPE_CHECKING:
    from pipeline.engine import Ranks
    from pipeline.evaluation import Specification
    from pipeline.evaluation.compare import Compared
    from pipeline.training.sweep import Child, Sweep


def sweep(
    config: Annotated[list[str], typer.Argument(help="several values make an axis", metavar="CONFIG KEY=VALUE,VALUE...")],
    folder: Annotated[Path | None, typer.Option(help="of the children's runs; runs/NAME_sweep by default")] = None,
    split: Annotated[str, typer.Option(help="that compares the children: choosing by test would spoil it")] = "valid",
    limit: Annotated[int | None, typer.Option(help="use the first so many records of the split", min=1)] = None,
    tables: Annotated[str, typer.Option(help="of each child's evaluation, joined by commas")] = "swap,fidelity,leak,cost",
    checkpoint: Annotated[str, typer.Option(help="which of each child's is evaluated: latest or best")] = "latest",
    judge_images: Annotated[int | None, typer.Option(help="length of training of a judge where there is none", min=1)] = None,
    child: Annotated[int | None, typer.Option(help="only this one, counted from 0, as a job of an array runs it", min=0)] = None,
    only_table: Annotated[bool, typer.Option("--table", help="train nothing: the table and the plot of what is there")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit the children as a Slurm array, and the table behind it")] = False,
    sbatch: Annotated[str, typer.Option(help="words for sbatch, as '--gpus-per-node=1 --time=4:00:00'")] = "",
) -> None:
    """Train an experiment at every point of a grid, evaluate each, and plot what swaps cost in reconstruction.

    Given again it goes on: children that are finished are skipped, one that was broken off is resumed.
    """
    from pipeline.engine import leave, open_ranks
    from pipeline.evaluation import Specification
    from pipeline.training import sweep as sweeps

    if checkpoint not in ("latest", "best"):
        raise ValueError(f"--checkpoint {checkpoint}: the children are compared by their latest or their best")
    asked = sweeps.plan(config[0], config[1:], folder)
    names = tuple(name.strip() for name in tables.split(","))
    specification = Specification(split=split, limit=limit, tables=names, checkpoint=checkpoint, judge_images=judge_images)
    if child is not None and child >= len(asked.children):
        raise ValueError(f"--child {child}: this sweep has {len(asked.children)}, counted from 0")
    ranks = open_ranks("auto")
    _announce(asked, ranks)
    if slurm:
        _parent(asked, ranks)
        how = ["--split", split, "--tables", tables, "--checkpoint", checkpoint]
        how += ["--limit", str(limit)] if limit else []
        _submit(asked, [*config, "--folder", str(asked.folder), *how], shlex.split(sbatch))
        return
    children = () if only_table else asked.children if child is None else (asked.children[child],)
    failed = _train_and_evaluate(children, asked, specification, ranks)
    leave()
    if ranks.is_main and child is None:
        _conclude(asked, specification)
    if failed:
        typer.echo(f"error: {', '.join(failed)} did not finish (see above)", err=True)
        raise typer.Exit(1)


def _submit(asked: Sweep, words: list[str], options: list[str]) -> None:
    """Submit a job a child, as an array, and behind them one that makes the table. Judges must be there for all of them."""
    if not asked.base.judges:
        raise ValueError("children in jobs of their own need judges that are there: name them, as judge=[runs/A,runs/B]")
    script = str(Path(__file__).resolve().parent / "slurm" / "sweep.sbatch")
    array = _sbatch([*options, f"--array=0-{len(asked.children) - 1}", script, *words])
    table = _sbatch([*options, f"--dependency=afterany:{array}", script, *words, "--table"])
    typer.echo(f"submitted {len(asked.children)} children as array job {array}, their table as job {table}")
    typer.echo(f"next: squeue --jobs={array},{table}; the table comes into {asked.folder / 'report'}")


def _sbatch(words: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("sbatch is not there: --slurm needs a machine from which Slurm takes jobs") from None
    if done.returncode:
        raise ValueError(f"sbatch: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _announce(asked: Sweep, ranks: Ranks) -> None:
    if ranks.is_main:
        grid = ", ".join(f"{key} in {' '.join(values)}" for key, values in asked.axes.items())
        typer.echo(f"sweep of {len(asked.children)} runs in {asked.folder}: {grid}")


def _parent(asked: Sweep, ranks: Ranks) -> str | None:
    """The sweep's own MLflow run, made at the first call; None where runs are not tracked or no store answers."""
    from pipeline import tracking

    about = asked.base.tracking
    if ranks.is_main and about.enabled and not (asked.folder / "spool" / "main.jsonl").is_file():
        tracker = tracking.open_tracker(True, asked.folder, about.experiment, asked.name, True)
        tracker.start()
        tracker.params(asked.to_dict())
        tracker.tags({"fader.sweep": asked.name})
        tracker.finish("FINISHED")
    ranks.wait()
    return tracking.run_id_of(asked.folder) if about.enabled else None


def _train_and_evaluate(children: Sequence[Child], asked: Sweep, specification: Specification, ranks: Ranks) -> list[str]:
    """Bring children to their end and measure them; return the labels of those whose updates were not finite."""
    from pipeline.training.interruption import Interrupted

    parent, failed = _parent(asked, ranks) if children else None, []
    try:
        for child in children:
            if _train(child, parent, asked, ranks):
                _evaluate(child, specification, ranks)
            else:
                failed.append(child.label)
    except Interrupted as stopped:
        stop(stopped, "the same command goes on with the sweep")
    return failed


def _train(child: Child, parent: str | None, asked: Sweep, ranks: Ranks) -> bool:
    """Train a child to its end: not at all when it is there, from its newest checkpoint when it was broken off.
    Returns: Whether it came to its end; False when its updates were not finite."""
    from pipeline.models import checkpoint
    from pipeline.training.run import train
    from pipeline.training.sweep import has_begun, with_parent

    began, finite = has_begun(child), True
    if began and checkpoint.finished(child.folder):
        if ranks.is_main:
            typer.echo(f"{child.label}: trained already")
        return True
    ranks.wait()  # all have looked before one writes
    if ranks.is_main:
        number = f"{child.number + 1} of {len(asked.children)}"
        typer.echo(f"{child.label} ({number}): {'resuming' if began else 'training'} in {child.folder}")
    try:
        with watching_training() as watch:
            train(with_parent(child, parent), child.folder, resume=began, watch=watch)
    except FloatingPointError as error:
        finite = False
        if ranks.is_main:
            typer.echo(f"{child.label}: {error}", err=True)
    ranks.wait()  # the main rank has written its end
    return finite


def _evaluate(child: Child, specification: Specification, ranks: Ranks) -> None:
    from pipeline.training.sweep import evaluate_child

    with progress_bar("records") as progress:
        files = evaluate_child(child, specification, ranks, progress)
    if ranks.is_main:
        typer.echo("\n".join(f"wrote {file}" for file in files) if files else f"{child.label}: evaluated already")


def _conclude(asked: Sweep, specification: Specification) -> None:
    """The table and the plot of what there is, on the terminal, in the sweep's folder and in its MLflow run."""
    from pipeline import evaluation, tracking
    from pipeline.evaluation import compare
    from pipeline.models import checkpoint
    from pipeline.training import sweep

    compared: list[Compared | None] = []
    for child in asked.children:
        report = sweep.report_of(child, specification) if checkpoint.latest(child.folder) else None
        compared.append(compare.read(str(child.folder), specification.split, report) if report else None)
    runs = [run for run in compared if run is not None]
    table = sweep.table(asked, compared, specification.split)
    files = [write_whole(asked.folder / "report" / f"sweep-{specification.split}.md", evaluation.as_markdown([table]))]
    png = compare.plot(runs, specification.split)
    if png is not None:
        files.append(write_whole(asked.folder / "report" / f"sweep-{specification.split}.png", png))
    best = sweep.chosen(asked, compared)
    metrics: dict[str, float] = {}
    if best is not None and (numbers := compared[best.number]) is not None:
        metrics = {f"chosen/{name}": value for name, value in numbers.metrics.items() if "_to_" not in name}
    tracking.add(asked.folder, metrics, 0, files=files)
    show(table)
    for warning in compare.warnings(runs, specification.split):
        typer.echo(f"note: {warning}")
    for file in files:
        typer.echo(f"wrote {file}")
    if best is not None:
        say_next("evaluate", best.folder, "--report")
    elif runs:
        say_next("compare", *(child.folder for child, run in zip(asked.children, compared) if run))


if __name__ == "__main__":
    main(sweep)
