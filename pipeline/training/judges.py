"""The judges of an evaluation: those a user names, the model's own, or a panel that is trained and kept for next time."""

import hashlib
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
from pipeline.models import PANEL_SIZE, Model, checkpoint
from pipeline.training.run import Progress, train

log = logging.getLogger(__name__)

EPOCHS = 40  # at most: a small set has taught what it can by then
SHARED = {"name": "judge", "betas": [0.9, 0.99], "ema_half_life": 20_000}
PANEL: dict[str, dict[str, Any]] = {  # the judges nobody named, by preset, as configs/celeba_*judge.yaml are
    "residual": {"seed": 7002, "batch_size": 64, "method": {"images": 112_000, "learning_rate": 2e-3, "dropout": 0.2}},
    "official": {"seed": 7001, "batch_size": 32, "method": {"images": 224_000, "learning_rate": 1.5e-3, "dropout": 0.1}},
}
STEADY = 2 / 7  # the share of the images before the learning rate falls
AUGMENT = {
    "rotation_degrees": 6.0, "translation": 0.06, "brightness": 0.2, "contrast": 0.3, "saturation": 0.5, "hue": 0.03,
    "blur": 1.6, "rescaling": 0.56, "noise": 0.1,
}  # fmt: skip


def panel_of(evaluated: Sequence[Model], shards: ShardSet, specification: Specification, ranks: Ranks) -> tuple[Model, ...]:
    """Return the judges of all models: those named, else those that the first model with judges brings, else a panel.

    There are none where all models are judges, and where no table needs one and none is named.
    ranks: all of them train a missing judge together.
    Raises ValueError: a judge named cannot be loaded; the models do not say what they see; one has a panel's seed; the training
    fails. Interrupted: as `train`; the same call goes on with it.
    """
    judged = [model for model in evaluated if makes_pictures(model.method)]
    if judged and specification.judges:
        judges = tuple(models.load(address) for address in specification.judges)
    elif not judged or not {"swap", "distribution"} & set(specification.tables):
        return ()
    else:
        own = next((model.judges for model in judged if model.judges), ())
        for model in () if own else judged:
            _check_seed(model)
        judges = own or tuple(_kept(preset, judged[0], shards, specification, ranks) for preset in PANEL)
    return tuple(specification.place(judge) for judge in judges)


def _check_seed(model: Model) -> None:
    """Refuse (ValueError) a model that started as a judge of the panel would, before that judge is trained."""
    seed = (model.card.get("config") or {}).get("seed")
    if any(seed == judge["seed"] for judge in PANEL.values()):
        raise ValueError(
            f"{model.source} was trained with seed {seed}, which a judge of the panel has: their networks start alike; "
            "name judges of other seeds (--judge), or train it anew with another seed"
        )


def _kept(preset: str, model: Model, shards: ShardSet, specification: Specification, ranks: Ranks) -> Model:
    """Return the judge that is kept beside a model's run (or in runs/), trained first, or to its end, where needed.
    It knows every attribute of the data, and is asked for the model's."""
    experiment = _experiment(preset, model, shards, specification.judge_images)
    folder = experiment.folder
    started = (folder / "run.json").is_file()
    newest = checkpoint.latest(folder) if started else None
    left = experiment.method.images - (0 if newest is None else checkpoint.images_of(newest))
    if ranks.is_main:
        what = f"the {preset} one kept in {folder} judges"
        if left > 0:
            what = f"the {preset} one is trained on {shards.path} for {left:,} images and kept in {folder}"
        log.info("%s names no judges; %s", model.source, what)
    if left > 0:
        train(experiment, folder, resume=started, watch=_say)
        ranks.wait()  # the main rank has written it
    return models.load(folder)


def _experiment(preset: str, model: Model, shards: ShardSet, images: int | None) -> Experiment:
    """Return the experiment of such a judge: the data as the model sees them, all attributes, and faint things taken away.
    Its folder is named after the digests of the data, because another set may lie in a folder of the same name, and of the
    settings, because judges of other settings or attributes may lie beside it."""
    sees = model.preprocessing
    size = min(sees.image_size, PANEL_SIZE)
    theirs: dict[str, Any] = model.card.get("config") or {}
    loading = {key: value for key, value in (theirs.get("data") or {}).items() if key in ("loader", "flip", "threads")}
    asked = model.attributes.names if len(model.attributes) < len(shards.attributes) else ()
    method = {**SHARED, "preset": preset, **PANEL[preset]["method"], "asked": list(asked)}
    settings = hashlib.sha256(json.dumps([method, AUGMENT]).encode()).hexdigest()[:6]
    method["images"] = images or min(method["images"], EPOCHS * len(shards.split("train")))
    method["decay_from"] = round(STEADY * method["images"])
    method["decay_images"] = method["images"] - method["decay_from"]
    name = f"judge_{shards.digest[:12]}_{sees.crop}{size}{'_grey' if sees.channels == 1 else ''}_{preset}_{settings}"
    seen = {"attributes": ["*"], "image_size": size, "crop": sees.crop, "channels": sees.channels}
    tree = {
        **PANEL[preset],
        "name": name,
        "method": method,
        "data": {**loading, **seen, "path": str(shards.path), "augment": AUGMENT},
        "run": {"folder": str((model.run.parent if model.run else Path("runs")) / name), "picture_images": 0},
        "tracking": theirs.get("tracking") or {},
    }
    return config.build(json.loads(json.dumps(tree)), f"the judge of {model.source}")


def _say(progress: Progress) -> None:
    loss = progress.metrics.get("classifier/loss")
    shown = "" if loss is None else f", loss {loss:.3f}"
    log.info("judge: %s of %s images%s", f"{progress.clock.images:,}", f"{progress.total_images:,}", shown)
