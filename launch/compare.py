"""`fader compare RUN RUN…`: runs side by side, and what their swaps cost in reconstruction."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.command import main, say_next, show
from pipeline.files import write_whole


def compare(
    runs: Annotated[list[str], typer.Argument(help="folders of runs", metavar="RUN...")],
    split: Annotated[str, typer.Option(help="whose evaluation: train, valid or test")] = "test",
    plot: Annotated[Path, typer.Option(help="where the plot of MSE against swap accuracy goes")] = Path("compare.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything compared here")] = None,
) -> None:
    """Settings that differ, last losses and evaluated numbers, a column a run; a plot of MSE against swap accuracy."""
    from pipeline.evaluation import compare as comparison

    compared = [comparison.read(source, split) for source in runs]
    for table in comparison.as_tables(compared, split):
        show(table)
    for warning in comparison.warnings(compared, split):
        typer.echo(f"note: {warning}")
    if json_file:
        content = [run.to_dict() for run in compared]
        typer.echo(f"wrote {write_whole(json_file, json.dumps(content, indent=1, allow_nan=False))}")
    png = comparison.plot(compared, split)
    if png is None:
        typer.echo("no plot: no run has both a reconstruction MSE and a swap accuracy")
        say_next("evaluate", *runs)
    else:
        typer.echo(f"wrote {write_whole(plot, png)}")
        say_next("evaluate", runs[0], "--report")


if __name__ == "__main__":
    main(compare)
