"""`fader study ANSWERS.csv`: how natural a study's pictures look to people, and how often they show what was asked for."""

from pathlib import Path
from typing import Annotated

import typer

from launch.command import main


def study(answers: Annotated[Path, typer.Argument(help="the file of 'fader app --study'", metavar="CSV")]) -> None:
    """Print naturalness and accuracy with 95% intervals (Wilson's), by kind of picture and by attribute."""
    from pipeline.app.study import read_answers, results

    rows = read_answers(answers)
    if not rows:
        raise ValueError(f"{answers} holds no answer yet")
    typer.echo(f"{len(rows):,} answers of {len({row['rater'] for row in rows}):,} people")
    line = "{:<15} {:<20} {:>7}  {:<26} {}".format
    typer.echo(line("pictures", "attribute", "answers", "look natural", "show the value"))
    for kind, attribute, count, natural, right in results(rows):
        typer.echo(line(kind, attribute, count, natural, right))


if __name__ == "__main__":
    main(study)
