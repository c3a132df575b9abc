"""Deliver to MLflow what tracking could not deliver while a run was trained: `fader sync RUN`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.command import main


def sync(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs", metavar="RUN...")],
    again: Annotated[bool, typer.Option("--again", help="send all again; what is there already stays as it is")] = False,
) -> None:
    """Send what is left of a run's tracking spool to MLflow; makes the MLflow run if there is none."""
    from pipeline import tracking

    for run in runs:
        left = tracking.undelivered(run)
        typer.echo(f"{run}: {left:,} events left to deliver" + (", sending all again" if again else ""), err=True)
        done = tracking.sync(run, again=again)
        why = f"; {done.refused} refused, see {run / 'spool' / 'sender.log'}; 'fader sync --again {run}' tries them again"
        refused = why if done.refused else ""
        typer.echo(f"delivered {done.sent:,} events of {run} to run {done.run_id} in {done.uri}{refused}")


if __name__ == "__main__":
    main(sync)
