"""`fader promote NAME --min smiling.swap=0.9 --better-than champion`: make a registered version the champion, if it holds."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.command import main, say_next
from launch.evaluate import find_judges, measure, show_reports

if TYPE_CHECKING:
    from pipeline.evaluation import Specification


def promote(
    name: Annotated[str, typer.Argument(help="the registered model", metavar="NAME")],
    version: Annotated[str, typer.Option(help="what becomes the champion: a version's number or an alias")] = "challenger",
    least: Annotated[list[str] | None, typer.Option("--min", help="at least: smiling.swap=0.9", metavar="NAME=VALUE")] = None,
    most: Annotated[list[str] | None, typer.Option("--max", help="at most: mse=0.03", metavar="NAME=VALUE")] = None,
    better_than: Annotated[str | None, typer.Option(help="an alias or version that must be beaten, as champion")] = None,
    by: Annotated[str | None, typer.Option(help="the number in which it must be beaten; by default the swaps'")] = None,
    judge: Annotated[str | None, typer.Option(help="JUDGE,JUDGE of two builds; default: as fader evaluate")] = None,
    data: Annotated[Path | None, typer.Option(help="a shard set; by default the one the model was trained on")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    limit: Annotated[int | None, typer.Option(help="use the first so many records of the split", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="records encoded at a time", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU when there is one")] = "auto",
    rollback: Annotated[bool, typer.Option("--rollback", help="instead: the version before is the champion again")] = False,
) -> None:
    """Evaluate a version, beside the champion where it must be beaten, and move the alias champion only when all holds.

    Exits with 1 when something does not hold; the champion then stays what it is.
    """
    from pipeline.config import addresses
    from pipeline.evaluation import Specification
    from pipeline.models import aliases

    if rollback:
        replaced, now = aliases.rollback(name)
        typer.echo(f"{name}@{aliases.CHAMPION} is version {now} again, no longer version {replaced}")
        say_next("promote", name, "--better-than", "champion")
        return
    candidate = _address(name, version)
    beaten = _address(name, better_than) if better_than else None
    specification = Specification(
        models=(candidate,), judges=addresses(judge), data=data, split=split, limit=limit, tables=("swap", "fidelity"),
        batch_size=batch_size, device=device,
    )
    bounds = [*((word, "--min") for word in least or []), *((word, "--max") for word in most or [])]
    _promote(name, candidate, beaten, specification, bounds, by)


def _address(name: str, version: str) -> str:
    return f"models:/{name}/{version}" if version.isdigit() else f"models:/{name}@{version}"


def _promote(
    name: str, candidate: str, beaten: str | None, specification: "Specification", words: list[tuple[str, str]], by: str | None
) -> None:
    from pipeline.engine import leave, open_ranks
    from pipeline.evaluation import promotion, quantities
    from pipeline.models import aliases

    replaces = aliases.champion_of(name)
    if beaten == _address(name, aliases.CHAMPION) and replaces is None:
        typer.echo(f"note: {name} has no champion yet that could be beaten")
        beaten = None
    ranks = open_ranks(specification.device)
    specification = dataclasses.replace(
        specification, models=(candidate, *([beaten] if beaten else [])), device=str(ranks.device)
    )
    models = specification.load()
    version = models[0].card["registered"]["version"]
    if version == replaces:
        raise ValueError(f"{candidate} is version {version}, which is the champion already")
    shards = specification.open(models[0])
    judges = find_judges(models, shards, specification, ranks)
    known = quantities(models[0], judges, shards, specification)
    bounds = [promotion.parse_bound(word, option, known) for word, option in words]
    by = promotion.quantity(by, known) if by else None
    reports = [measure(model, judges, shards, specification, ranks) for model in models]
    leave()
    show_reports(reports)
    reasons = promotion.reasons_against(reports[0], reports[1] if beaten else None, bounds, by)
    for reason in reasons:
        typer.echo(f"not promoted: {reason}", err=True)
    if reasons:
        raise typer.Exit(1)
    aliases.promote(name, version, replaces, promotion.tags(reports[0], bounds))
    instead = f", which replaces version {replaces}" if replaces else ""
    typer.echo(f"{name}@{aliases.CHAMPION} is version {version} now{instead}")
    typer.echo(f"next: mlflow models serve -m models:/{name}@{aliases.CHAMPION} --env-manager local")


if __name__ == "__main__":
    main(promote)
