"""An evaluation in its run's folder and in MLflow: what its files are called, and what they rest on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.data.shards import ShardSet
from pipeline.evaluation import page
from pipeline.evaluation.measure import makes_pictures
from pipeline.evaluation.presentation import markdown
from pipeline.evaluation.report import Report
from pipeline.evaluation.specification import USUAL_TABLES, Specification
from pipeline.files import write_whole
from pipeline.models import Model, parse_source, readers_of


def file_name(specification: Specification, variant: str, split_records: int) -> str:
    """Name a report's files: `evaluation-SPLIT` of all usual tables, the whole split and the newest weights."""
    tables, records = specification.tables, specification.records(split_records)
    part = "" if set(USUAL_TABLES) <= set(tables) else "-" + "-".join(sorted(tables))
    first = f"-first-{records}" if records < split_records else ""
    return f"evaluation-{specification.split}{variant}{part}{first}"


def keep(model: Model, report: Report, specification: Specification) -> list[Path]:
    if model.run is None:
        return []
    if not makes_pictures(model.method):  # a judge's table does not depend on the tables asked for
        specification = Specification(split=specification.split, limit=specification.limit)
    path = model.run / "report" / file_name(specification, model.variant, report.split_records)
    return [
        write_whole(path.with_name(f"{path.name}.json"), as_json([report])),
        write_whole(path.with_name(f"{path.name}.md"), markdown([report])),
    ]


def draw_page(model: Model, report: Report, judges: Sequence[Model], shards: ShardSet, specification: Specification) -> Path:
    assert model.run is not None
    judge = judges[0] if judges and makes_pictures(model.method) else None
    return page.write(report, model, judge, shards, model.run / "report", specification)


def track(model: Model, report: Report, files: Sequence[Path]) -> tracking.Addition | None:
    """Add a run's numbers and files to its MLflow run; None where it has none.

    Numbers of a part of a split and of raw weights are not added, because they would pass for others there.
    """
    if model.run is None or report.records < report.split_records or model.variant.endswith("-raw"):
        return None
    return tracking.add(model.run, report.metrics(), report.images_seen or 0, files=list(files), tags=report.tags())


def is_kept(path: Path, model: Model, judges: Sequence[Model], shards: ShardSet, specification: Specification) -> bool:
    """Whether a report lies there that rests on as many images seen, and on the same judges, readings and records."""
    split = shards.split(specification.split)
    rests_on = {
        "images_seen": model.card["images_seen"],
        "judge": ", ".join(judge.source for judge in judges) or None,
        "judge_digests": [judge.digest() for judge in judges],
        "readers": [one.name for one in readers_of(judges, model.attributes)] if "swap" in specification.tables else [],
        "split_digest": split.digest,
        "records": specification.records(len(split)),
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return all(known.get(key) == value for key, value in rests_on.items())


def check_runs(sources: Sequence[str]) -> None:
    """Raises ValueError unless every model is a run, into whose folder its page goes."""
    for source in sources:
        if not (parse_source(source)[0] / "config.yaml").is_file():
            raise ValueError(f"--report writes into a run's folder, and {source} is none: name its run")


def as_json(reports: Sequence[Report]) -> str:
    """One report as an object, several as a list of them."""
    content: list[dict[str, Any]] = [report.to_dict() for report in reports]
    return json.dumps(content[0] if len(content) == 1 else content, indent=1, allow_nan=False) + "\n"
