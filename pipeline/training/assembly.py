"""Put a run together: its data, method, engine, loaders, validation, tracker and folder. Every rank does it alike."""

import contextlib
import json
import logging
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from fader.attributes import Attributes
from pipeline.config import Experiment, build_method
from pipeline.data.shards import ShardSet
from pipeline.engine import Engine
from pipeline.files import write_whole
from pipeline.models import sampler
from pipeline.ownership import Owner, owned
from pipeline.tracking import open_tracker
from pipeline.training import watchdog
from pipeline.training.batches import Batches, Loaders
from pipeline.training.interruption import STOP_FILE, Listener
from pipeline.training.retention import CheckpointWriter, restore
from pipeline.training.steps import ResumePoint
from pipeline.training.validation import BestSoFar, Validation, named_judges
from pipeline.training.watchdog import Watchdog

log = logging.getLogger(__name__)

LABELS_KEPT = 1_000
CARDS = ("config.yaml", "run.json")  # they say what a run is


class Run:
    """What one rank's part of a run is made of, ready to go on from its newest sound checkpoint, or to begin.

    point: where it stands. writer: None on all ranks but the main one.
    stack: holds the run's folder for this process until it is closed.
    Raises ValueError: what the user gave does not fit together, or another process trains in the folder; nothing was written
    then.
    """

    def __init__(self, experiment: Experiment, folder: Path, resume: bool, listener: Listener, stack: ExitStack) -> None:
        self.experiment, self.folder, self.listener = experiment, folder, listener
        shards = ShardSet.open(experiment.data.path)
        torch.manual_seed(experiment.seed)
        method = build_method(experiment, shards.attributes)
        self.stages = method.stages()
        _check_card(folder, resume, shards, method.attributes)
        judges = named_judges(experiment)
        self.engine = Engine(method, precision=experiment.precision, seed=experiment.seed, settings=experiment.engine)
        _check_batch_size(experiment, self.engine.world_size)
        owner = _own(folder, self.engine, stack)
        _check_card(folder, resume, shards, method.attributes)  # again, because another process may have been here until now
        point = (restore(self.engine, folder, experiment.seed) if resume else None) or ResumePoint()
        self.loaders = Loaders(experiment, self.engine, point.quarantine)
        self.batches = Batches(experiment, self.engine, shards.split("train"), self.loaders)
        self.validation: Validation | None = None
        if experiment.run.evaluate_images or experiment.run.picture_images:
            whole = lambda split: self.loaders.open(split, whole=True)  # noqa: E731
            self.validation = Validation(experiment, self.engine, judges, shards, whole)
        self.engine.wait()
        self.batches.open()
        self.tracker = open_tracker(
            experiment.tracking.enabled, folder, experiment.tracking.experiment, experiment.name, self.engine.is_main,
            node=self.engine.node, local_main=self.engine.is_local_main,
        )  # fmt: skip
        settings = experiment.run
        self.writer = owner and CheckpointWriter(
            folder, settings.keep, every_images=settings.keep_every_images, best=settings.keep_best, owner=owner
        )
        hung = lambda text: self.tracker.tags({"hung": text})  # noqa: E731
        self.watchdog = Watchdog(folder, self.engine.rank, self.engine.world_size, settings.watchdog_minutes, hung)
        self.go_to(point)
        if self.engine.is_main:
            stack.push(self._unless_refused())
            _open_folder(self, shards)
        else:
            self.tracker.start()

    @property
    def images(self) -> int:
        return self.point.position.clock.images

    @property
    def best_so_far(self) -> BestSoFar | None:
        return self.validation.best_so_far if self.validation else None

    def _unless_refused(self) -> Callable[..., None]:
        """Return an exit that puts the cards back as they were, where settings are refused before any update."""
        before = {path: path.read_bytes() if path.exists() else None for path in (self.folder / name for name in CARDS)}
        began = self.images

        def leave(kind: type[BaseException] | None, *_: object) -> None:
            if kind and issubclass(kind, ValueError) and self.images == began:
                for path, content in before.items():
                    path.unlink(missing_ok=True) if content is None else write_whole(path, content)

        return leave

    def go_to(self, point: ResumePoint) -> None:
        """Stand at a point whose weights the engine holds."""
        self.point = point
        if self.best_so_far:
            self.best_so_far.load(point.validation)


def _check_card(folder: Path, resume: bool, shards: ShardSet, attributes: Attributes) -> None:
    """Check that the folder's run.json is of the run to resume, and that there is none for one that begins."""
    card = folder / "run.json"
    if not resume:
        if card.exists():
            raise ValueError(f"{folder} already holds a run; 'fader train --resume {folder}' goes on, run.folder=… takes another")
        return
    if not card.exists():
        raise ValueError(f"{folder} holds no run to resume (no run.json in it)")
    before = json.loads(card.read_text())
    if before["data_digest"] != shards.digest:
        learnt, here = before["data_digest"][:12], shards.digest[:12]
        raise ValueError(f"{folder} was trained on data {learnt}, {shards.path} holds {here}: name the same set, or a new run")
    if before["attributes"] != attributes.to_list():  # networks may be of the same shape
        learnt = ", ".join(entry["name"] for entry in before["attributes"])
        raise ValueError(f"{folder} learns {learnt}, and {', '.join(attributes.names)} cannot go on from there: start a new run")


def _own(folder: Path, engine: Engine, stack: ExitStack) -> Owner | None:
    """Own the run's folder on the main rank; raise ValueError on every rank where another process has it."""
    owner = refusal = None
    if engine.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            owner = stack.enter_context(owned(folder / "owner", str(folder)))
            stack.callback(_leave_no_trace, folder)
        except (ValueError, OSError) as error:
            refusal = error
    if engine.largest(refusal is not None):
        raise refusal or ValueError(f"the main rank cannot have {folder}")
    return owner


def _leave_no_trace(folder: Path) -> None:
    if not (folder / "run.json").exists():
        (folder / "owner").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_batch_size(experiment: Experiment, ranks: int) -> None:
    """Raise ValueError when a rank's share of a batch cannot be taken in the parts that are asked for."""
    size, parts = experiment.batch_size, experiment.engine.accumulation
    if size // ranks < parts:
        has = f"batch_size {size} leaves a rank of {ranks} {size // ranks} records"
        raise ValueError(f"{has}, and engine.accumulation needs {parts}: raise batch_size to {parts * ranks}")


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
    joint = {"labels": _some_labels(run, shards)} if sampler(engine.method) else {}
    write_whole(run.folder / "run.json", json.dumps(card | joint, indent=1))
    watchdog.clear(run.folder)
    tracker.start(run.images)
    tracker.params(experiment.to_dict())
    tracker.tags({key: str(value) for key, value in card.items() if key != "attributes"})
    if experiment.tracking.parent:
        tracker.tags({"mlflow.parentRunId": experiment.tracking.parent})
    tracker.artifact(run.folder / "config.yaml")


def _some_labels(run: Run, shards: ShardSet) -> list[str]:
    """Return the labels of some training records, from which a sampler draws combinations that occur."""
    labels = shards.split("train").columns(run.engine.method.attributes)  # a split's order is a fixed shuffle
    return [" ".join(f"{value:g}" for value in row) for row in labels[:LABELS_KEPT]]


def commit() -> str:
    """Return the commit of the code that runs, with "+changes" when the checkout has some; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
