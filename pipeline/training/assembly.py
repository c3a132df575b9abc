"""Put a run together: its data, method, engine, loaders, validation, tracker and folder. Every rank does it alike."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fader.method import Stage
from pipeline.config import Experiment, build_method
from pipeline.data.shards import ShardSet
from pipeline.engine import Engine
from pipeline.files import write_whole
from pipeline.tracking import Tracker, open_tracker
from pipeline.training import watchdog
from pipeline.training.batches import Batches, Loaders
from pipeline.training.interruption import STOP_FILE, Listener
from pipeline.training.retention import CheckpointWriter, restore
from pipeline.training.steps import ResumePoint
from pipeline.training.validation import BestSoFar, Validation, named_judges
from pipeline.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What one rank's part of a run is made of. point: where it stands. writer: None on all ranks but the main one."""

    experiment: Experiment
    folder: Path
    stages: tuple[Stage, ...]
    engine: Engine
    loaders: Loaders
    batches: Batches
    validation: Validation | None
    listener: Listener
    tracker: Tracker
    writer: CheckpointWriter | None
    watchdog: Watchdog
    point: ResumePoint

    @property
    def images(self) -> int:
        """Images seen so far by all ranks."""
        return self.point.position.clock.images

    @property
    def best_so_far(self) -> BestSoFar | None:
        return self.validation.best_so_far if self.validation else None

    def go_to(self, point: ResumePoint) -> None:
        """Stand at a point whose weights the engine holds."""
        self.point = point
        if self.best_so_far:
            self.best_so_far.load(point.validation)


def assemble(experiment: Experiment, folder: Path, resume: bool, listener: Listener) -> Run:
    """Return a run that is ready to go on from its newest sound checkpoint, or to begin.

    Raises:
        ValueError: what the user gave does not fit together; nothing was written then.
    """
    shards = ShardSet.open(experiment.data.path)
    torch.manual_seed(experiment.seed)
    method = build_method(experiment, shards.attributes)
    before = _read_card(folder, resume, shards)
    judges = named_judges(experiment)
    engine = Engine(method, precision=experiment.precision, seed=experiment.seed, settings=experiment.engine)
    _check_batch_size(experiment, engine.world_size)
    if before and engine.is_main:
        _warn_of_other_ranks(experiment, before["world_size"], engine.world_size)
    point = (restore(engine, folder) if resume else None) or ResumePoint()
    loaders = Loaders(experiment, engine, point.quarantine)
    batches = Batches(experiment, engine, shards.split("train"), loaders)
    validation = None
    if experiment.run.evaluate_images or experiment.run.picture_images:
        validation = Validation(experiment, engine, judges, shards, lambda split: loaders.open(split, whole=True))
    engine.wait()
    batches.open()
    tracker = open_tracker(
        experiment.tracking.enabled, folder, experiment.tracking.experiment, experiment.name, engine.is_main,
        node=engine.node, local_main=engine.is_local_main,
    )  # fmt: skip
    tell = lambda text: tracker.tags({"hung": text})  # noqa: E731
    run = Run(
        experiment,
        folder,
        method.stages(),
        engine,
        loaders,
        batches,
        validation,
        listener,
        tracker,
        writer=_writer(experiment, folder) if engine.is_main else None,
        watchdog=Watchdog(folder, engine.rank, engine.world_size, experiment.run.watchdog_minutes, tell),
        point=point,
    )
    run.go_to(point)
    if engine.is_main:
        _open_folder(run, shards)
    else:
        tracker.start()
    return run


def _read_card(folder: Path, resume: bool, shards: ShardSet) -> dict[str, Any] | None:
    """Return what the folder's run.json says of the run to resume, or None for one that begins.

    Raises:
        ValueError: it holds a run and none is to be resumed, or the other way round, or a run of other data.
    """
    card = folder / "run.json"
    if not resume:
        if card.exists():
            raise ValueError(
                f"{folder} already holds a run; go on with 'fader train --resume {folder}' "
                "or choose another folder with run.folder=…"
            )
        return None
    if not card.exists():
        raise ValueError(f"{folder} holds no run to resume (no run.json in it)")
    before = json.loads(card.read_text())
    if before["data_digest"] != shards.digest:
        raise ValueError(
            f"{folder} was trained on data {before['data_digest'][:12]}, {shards.path} holds "
            f"{shards.digest[:12]}: resume with the same set, or start a new run"
        )
    return before


def _check_batch_size(experiment: Experiment, ranks: int) -> None:
    """Raise ValueError when a rank's share of a batch cannot be taken in the parts that are asked for."""
    size, parts = experiment.batch_size, experiment.engine.accumulation
    if size // ranks < parts:
        raise ValueError(
            f"batch_size {size} leaves a rank of {ranks} with {size // ranks} records, and engine.accumulation: {parts} "
            f"needs at least {parts}: raise batch_size to {parts * ranks}"
        )


def _warn_of_other_ranks(experiment: Experiment, before: int, now: int) -> None:
    """Warn that whole tars are read in another order, because it depends on the number of ranks; a plan's does not."""
    if experiment.data.loader == "sequential" and before != now:
        log.warning(
            "data.loader sequential: the run was on %d ranks and goes on with %d, which read other tars: of "
            "the epoch under way some records may be read twice and others not; the next epochs are whole",
            before, now,
        )  # fmt: skip


def _writer(experiment: Experiment, folder: Path) -> CheckpointWriter:
    settings = experiment.run
    return CheckpointWriter(folder, settings.keep, every_images=settings.keep_every_images, best=settings.keep_best)


def _open_folder(run: Run, shards: ShardSet) -> None:
    """Write what the run is, on the main rank, and tell the tracker."""
    experiment, engine, tracker = run.experiment, run.engine, run.tracker
    card = {
        "name": experiment.name,
        "method": experiment.method_name,
        "attributes": engine.method.attributes.to_list(),
        "data_digest": shards.digest,
        "data": {"name": shards.name, "records": {split: about["records"] for split, about in shards.info["splits"].items()}},
        "config_digest": experiment.digest,
        "commit": commit(),
        "world_size": engine.world_size,
        "backend": engine.backend,
    }
    run.listener.look_for(run.folder / STOP_FILE)
    write_whole(run.folder / "config.yaml", experiment.dump())
    write_whole(run.folder / "run.json", json.dumps(card, indent=1))
    watchdog.clear(run.folder)
    tracker.start(run.images)
    tracker.params(experiment.to_dict())
    tracker.tags({key: str(value) for key, value in card.items() if key != "attributes"})
    if experiment.tracking.parent:
        tracker.tags({"mlflow.parentRunId": experiment.tracking.parent})
    tracker.artifact(run.folder / "config.yaml")


def commit() -> str:
    """Return the commit of the code that runs, with "+changes" when the checkout has some; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
