"""`fader register RUN --name NAME`: export a run and make it a version in MLflow's registry."""

from pathlib import Path
from typing import Annotated

import typer

from launch.command import main


def register(
    run: Annotated[str, typer.Argument(help="the run's folder", metavar="RUN")],
    name: Annotated[str, typer.Option(help="the registered model, made when there is none of that name")],
    alias: Annotated[str, typer.Option(help="what points to the new version afterwards")] = "challenger",
    judge: Annotated[str | None, typer.Option(help="judges to put in, joined by commas; by default the run's own")] = None,
    out: Annotated[Path | None, typer.Option(help="where the export is written; RUN/export by default")] = None,
    checkpoint: Annotated[str, typer.Option(help="of the run: latest, best or images-N")] = "latest",
    raw: Annotated[bool, typer.Option("--raw", help="the weights as trained, not their moving averages")] = False,
) -> None:
    """Export a run (model.safetensors, card.json) and register it as a version in MLflow."""
    from pipeline import models

    typer.echo(f"registering {run} as {name}", err=True)
    version = models.register(run, name, alias=alias, judge=judge, out=out, checkpoint=checkpoint, ema=not raw)
    model = models.load(version.export)
    typer.echo(f"wrote {version.export} (model.safetensors, card.json)")
    linked = f", linked to run {version.run_id}" if version.run_id else "; the run itself was not tracked"
    typer.echo(f"registered {version.name} version {version.version} as {version.address} in {version.store}{linked}")
    if not model.card["metrics"] and not models.aligner(model.method):
        typer.echo(f"note: it carries no metrics; 'fader evaluate {run}' before registering puts them on its card")
    if not model.judges and models.editor(model.method):
        typer.echo("note: it carries no judge; a photo's own attributes will be estimated when it is edited")
    typer.echo(f"next: {model.capabilities[0].next_command(version.address)}")


if __name__ == "__main__":
    main(register)
