"""Who judges: the judge a user names, the model's own, or one that is trained on the same data and kept for next time."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.train import exit_code

if TYPE_CHECKING:
    from pipeline.config import Experiment
    from pipeline.engine import Ranks
    from pipeline.models import Model

log = logging.getLogger(__name__)

IMAGES = 120_000  # length of training of a judge nobody asked for: ten minutes at 64 pixels on a CPU core
EPOCHS = 30  # at most: a small set has taught what it can by then


def find(models: Sequence[Model], named: str | None, data: Path, images: int | None, ranks: Ranks) -> Model:
    """The judge of all models: the one named, else the first that a model brings, else one trained and kept.

    Args:
        named: a run, an export or a registry address.
        data: the shard set they are evaluated on; a judge learns from its training split.
        images: length of the training, should there be one; None takes the usual.
        ranks: all of them train it together.

    Raises:
        ValueError: the judge named cannot be loaded; the models do not say what they see; the training fails.
    """
    from pipeline import models as registry

    if named:
        return registry.load(named)
    for model in models:
        if model.judge is not None:
            return model.judge
    return kept(models[0], data, images, ranks)


def kept(model: Model, data: Path, images: int | None, ranks: Ranks) -> Model:
    """The judge that is kept beside a model's run (or in runs/), trained first, or to its end, where that is needed.

    It knows every attribute of the data, so that it serves other models of the same size and crop, too.
    """
    from pipeline import models as registry
    from pipeline.models import checkpoint
    from pipeline.training.interruption import Interrupted
    from pipeline.training.run import train

    experiment = derived(model, data, images)
    folder = experiment.folder
    started = (folder / "run.json").is_file()
    newest = checkpoint.latest(folder) if started else None
    done = 0 if newest is None else checkpoint.images_of(newest)
    left = experiment.method.images - done
    if ranks.is_main:
        what = f"the one kept in {folder} judges"
        if left > 0:
            what = f"one is trained on {data} for {left:,} images and kept in {folder}"
        log.info("%s names no judge; %s", model.source, what)
    if left > 0:
        try:
            train(experiment, folder, resume=started, watch=_say)
        except Interrupted as stopped:
            log.info("%s; the same command goes on with it", stopped)
            sys.exit(exit_code(stopped.reason.exit_code))
        ranks.wait()  # the main rank has written it
    return registry.load(folder)


def derived(model: Model, data: Path, images: int | None = None) -> Experiment:
    """The experiment of such a judge: the data as the model sees them, all attributes, the official classifier."""
    from pipeline import config
    from pipeline.data.shards import ShardSet

    shards, size = ShardSet.open(data), model.preprocessing.image_size
    beside = model.run.parent if model.run else Path("runs")
    theirs: dict[str, Any] = (model.card.get("config") or {}).get("data") or {}
    how = {key: theirs[key] for key in ("loader", "flip", "threads") if key in theirs}
    length = images or min(IMAGES, EPOCHS * len(shards.split("train")))
    name = f"{data.resolve().name}_judge_{size}"
    tree = {
        "name": name,
        "method": {"name": "judge", "preset": "official", "images": length, "learning_rate": 1e-3, "dropout": 0.3},
        "data": {**how, "path": str(data), "attributes": ["*"], "image_size": size, "crop": model.preprocessing.crop},
        "batch_size": 64,
        "run": {"folder": str(beside / name), "picture_images": 0},
        "tracking": (model.card.get("config") or {}).get("tracking") or {},
    }
    if (beside / name / "config.yaml").is_file():
        _same_sight(beside / name, model)
    return config.build(json.loads(json.dumps(tree)), f"the judge of {model.source}")


def _same_sight(folder: Path, model: Model) -> None:
    """Raises ValueError when the judge kept there sees pictures otherwise than this model."""
    from pipeline import config

    sees = config.load_run(folder).data.preprocessing()
    if sees != model.preprocessing:
        raise ValueError(
            f"the judge kept in {folder} sees pictures as {sees}, {model.source} makes them as {model.preprocessing}: "
            "name a judge with --judge, or move that one away"
        )


def _say(progress: Any) -> None:
    loss = progress.metrics.get("classifier/loss")
    shown = "" if loss is None else f", loss {loss:.3f}"
    log.info("judge: %s of %s images%s", f"{progress.clock.images:,}", f"{progress.total_images:,}", shown)
