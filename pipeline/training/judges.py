"""The judge of an evaluation: the one a user names, the model's own, or one that is trained and kept for next time."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import config, models
from pipeline.config import Experiment
from pipeline.data.shards import ShardSet
from pipeline.engine import Ranks
from pipeline.evaluation import Specification, makes_pictures
from pipeline.models import Model, checkpoint
from pipeline.training.run import Progress, train

log = logging.getLogger(__name__)

IMAGES = 120_000  # length of training of a judge nobody asked for: ten minutes at 64 pixels on a CPU core
EPOCHS = 30  # at most: a small set has taught what it can by then


def judge_of(evaluated: Sequence[Model], shards: ShardSet, specification: Specification, ranks: Ranks) -> Model | None:
    """Return the judge of all models: the one named, else the first that a model brings, else one trained and kept.

    It is None where all models are judges, and where no table needs one and none is named.

    Args:
        ranks: all of them train it together.

    Raises:
        ValueError: the judge named cannot be loaded; the models do not say what they see; the training fails.
        Interrupted: as `train`; the same call goes on with it.
    """
    judged = [model for model in evaluated if makes_pictures(model.method)]
    if judged and specification.judge:
        return specification.place(models.load(specification.judge))
    if not judged or not {"swap", "distribution"} & set(specification.tables):
        return None
    own = next((model.judge for model in judged if model.judge is not None), None)
    return specification.place(own or _kept(judged[0], shards, specification, ranks))


def _kept(model: Model, shards: ShardSet, specification: Specification, ranks: Ranks) -> Model:
    """Return the judge that is kept beside a model's run (or in runs/), trained first, or to its end, where needed.

    It knows every attribute of the data, so that it serves other models of the same size and crop, too.
    """
    experiment = _experiment(model, shards, specification.judge_images)
    folder = experiment.folder
    started = (folder / "run.json").is_file()
    newest = checkpoint.latest(folder) if started else None
    left = experiment.method.images - (0 if newest is None else checkpoint.images_of(newest))
    if ranks.is_main:
        what = f"the one kept in {folder} judges"
        if left > 0:
            what = f"one is trained on {shards.path} for {left:,} images and kept in {folder}"
        log.info("%s names no judge; %s", model.source, what)
    if left > 0:
        train(experiment, folder, resume=started, watch=_say)
        ranks.wait()  # the main rank has written it
    return models.load(folder)


def _experiment(model: Model, shards: ShardSet, images: int | None) -> Experiment:
    """Return the experiment of such a judge: the data as the model sees them, all attributes, the official classifier.

    Raises:
        ValueError: the judge that is kept in its folder sees pictures otherwise than this model.
    """
    size = model.preprocessing.image_size
    beside = model.run.parent if model.run else Path("runs")
    theirs: dict[str, Any] = model.card.get("config") or {}
    loading = {key: value for key, value in (theirs.get("data") or {}).items() if key in ("loader", "flip", "threads")}
    length = images or min(IMAGES, EPOCHS * len(shards.split("train")))
    name = f"{shards.path.resolve().name}_judge_{size}"
    seen = {"attributes": ["*"], "image_size": size, "crop": model.preprocessing.crop}
    tree = {
        "name": name,
        "method": {"name": "judge", "preset": "official", "images": length, "learning_rate": 1e-3, "dropout": 0.3},
        "data": {**loading, **seen, "path": str(shards.path)},
        "batch_size": 64,
        "run": {"folder": str(beside / name), "picture_images": 0},
        "tracking": theirs.get("tracking") or {},
    }
    if (beside / name / "config.yaml").is_file():
        sees = config.load_run(beside / name).data.preprocessing()
        if sees != model.preprocessing:
            raise ValueError(
                f"the judge kept in {beside / name} sees pictures as {sees}, {model.source} makes them as "
                f"{model.preprocessing}: name a judge with --judge, or move that one away"
            )
    return config.build(json.loads(json.dumps(tree)), f"the judge of {model.source}")


def _say(progress: Progress) -> None:
    loss = progress.metrics.get("classifier/loss")
    shown = "" if loss is None else f", loss {loss:.3f}"
    log.info("judge: %s of %s images%s", f"{progress.clock.images:,}", f"{progress.total_images:,}", shown)
