"""The loop: stages of phases, the clock, checkpoints, signals. Every rank runs it and makes the same steps."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fader.method import Batch, Clock, Decodes, Encodes, Method, Phase
from pipeline import checkpoint, evaluation, registry
from pipeline.batches import Loader, Plan, Request, sequential
from pipeline.config import Experiment, build_method
from pipeline.dali_loader import open_loader
from pipeline.engine import Engine
from pipeline.images import grid, png_bytes
from pipeline.shards import ShardSet, Split
from pipeline.steps import Position, steps
from pipeline.tar_loader import PillowLoader
from pipeline.tracking import Tracker, open_tracker

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STEPS_BETWEEN_AGREEMENTS = 4
_PICTURE_RECORDS = 6
_VALIDATION_BATCH = 128


class Interrupted(Exception):
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int, run: Path, images: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after {images:,} images, state saved in {run}")
        self.signal = number
        self.run = run
        self.images = images


@dataclass(frozen=True)
class Progress:
    """What a watcher is told at each log interval. metrics: means over the interval and over ranks."""

    clock: Clock
    total_images: int
    images_per_second: float
    metrics: Mapping[str, float]

    @property
    def seconds_left(self) -> float:
        return max(self.total_images - self.clock.images, 0) / max(self.images_per_second, 1e-9)


def train(
    experiment: Experiment, run: Path, *, resume: bool = False, watch: Callable[[Progress], None] | None = None
) -> Path:
    """Train an experiment to its end.

    Args:
        run: the run's folder. It must not hold a run yet, unless `resume`.
        resume: go on from the newest sound checkpoint (from the start when there is none yet).
        watch: called on the main rank at each log interval.

    Returns:
        The run's folder.

    Raises:
        ValueError: what the user gave does not fit together.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        FloatingPointError: no update of a phase was finite for a whole log interval.
        OSError: the last checkpoint could not be saved.
    """
    return _Run(experiment, run, resume, watch).go()


class _Run:
    """One process's part of a run, from its parts to its end."""

    def __init__(
        self, experiment: Experiment, run: Path, resume: bool, watch: Callable[[Progress], None] | None
    ) -> None:
        self.experiment, self.folder, self.watch = experiment, run, watch
        shards = ShardSet.open(experiment.data.path)
        self.split = shards.split("train")
        torch.manual_seed(experiment.seed)
        self.method = build_method(experiment, shards.attributes)
        self.stages = self.method.stages()
        self.total_images = sum(-(-s.images // experiment.batch_size) * experiment.batch_size for s in self.stages)
        self._check_folder(resume, shards)
        self.judge = registry.load(experiment.judge) if experiment.judge and experiment.run.evaluate_images else None
        if self.judge is not None:
            evaluation.check_judge(self.judge, self.method.attributes, experiment.data.preprocessing(), experiment.name)
        self.valid = shards.split("valid") if experiment.run.evaluate_images or experiment.run.picture_images else None
        self.engine = Engine(
            self.method, precision=experiment.precision, seed=experiment.seed, settings=experiment.engine
        )
        self._check_batch_size()
        self.position = Position()
        self.started_at = 0
        self.tracker_run_id: str | None = None
        if resume:
            self._restore()
        self.engine.wait()
        self.loader = self._open_loader(self.split, experiment.data.cache)
        self.valid_loader = self._open_loader(self.valid, False) if self.judge else None
        self._open_folder(shards)
        self.rate = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.stopped_by = 0

    # --- before -----------------------------------------------------------------------------------------------------

    def _check_folder(self, resume: bool, shards: ShardSet) -> None:
        card = self.folder / "run.json"
        if not resume:
            if card.exists():
                raise ValueError(
                    f"{self.folder} already holds a run; go on with 'fader train --resume {self.folder}' "
                    "or choose another folder with run.folder=…"
                )
            return
        if not card.exists():
            raise ValueError(f"{self.folder} holds no run to resume (no run.json in it)")
        before = json.loads(card.read_text())
        if before["data_digest"] != shards.digest:
            raise ValueError(
                f"{self.folder} was trained on data {before['data_digest'][:12]}, {shards.path} holds "
                f"{shards.digest[:12]}: resume with the same set, or start a new run"
            )

    def _check_batch_size(self) -> None:
        size, ranks, parts = self.experiment.batch_size, self.engine.world_size, self.experiment.engine.accumulation
        if size // ranks < parts:
            raise ValueError(
                f"batch_size {size} leaves a rank of {ranks} with {size // ranks} records, and engine.accumulation: {parts} "
                f"needs at least {parts}: raise batch_size to {parts * ranks}"
            )

    def _restore(self) -> None:
        newest = checkpoint.latest(self.folder)
        if newest is None:
            return
        state, extra = checkpoint.read(newest)
        self.engine.load(state)
        self.position = Position.from_dict(extra["position"])
        self.started_at = self.position.clock.images

    def _open_loader(self, split: Split, cache: bool) -> Loader:
        data = self.experiment.data
        return open_loader(
            data.loader,
            cache,
            split=split,
            attributes=self.method.attributes,
            preprocessing=data.preprocessing(),
            seed=self.experiment.seed,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            device=self.engine.device,
            threads=data.threads,
            prefetch=data.prefetch,
        )

    def _open_folder(self, shards: ShardSet) -> None:
        """The main rank writes what the run is, and opens its tracker."""
        experiment = self.experiment
        self.tracker: Tracker = open_tracker(
            experiment.tracking.enabled, self.folder, experiment.tracking.experiment, experiment.name, self.engine.is_main
        )
        self.writer: checkpoint.Writer | None = None
        if not self.engine.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        card = {
            "name": experiment.name,
            "method": experiment.method_name,
            "attributes": self.method.attributes.to_list(),
            "data_digest": shards.digest,
            "config_digest": experiment.digest,
            "commit": commit(),
            "world_size": self.engine.world_size,
            "backend": self.engine.backend,
        }
        (self.folder / "config.yaml").write_text(experiment.dump())
        (self.folder / "run.json").write_text(json.dumps(card, indent=1))
        self.writer = checkpoint.Writer(self.folder, experiment.run.keep)
        self.tracker.start(self.started_at)
        self.tracker.params(experiment.to_dict())
        self.tracker.tags({key: str(value) for key, value in card.items() if key != "attributes"})
        self.tracker.artifact(self.folder / "config.yaml")

    # --- the loop ---------------------------------------------------------------------------------------------------

    def go(self) -> Path:
        status = "FAILED"
        try:
            with _signals_into(self):
                self._loop()
            self._save()
            if self.writer:
                self.writer.close()
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            self.tracker.finish(status)
        return self.folder

    def _loop(self) -> None:
        size = self.experiment.batch_size
        plan = Plan(
            len(self.split),
            self.experiment.seed,
            window=self.experiment.data.window,
            shard_of=self.split.shard,
            replacement=self.experiment.data.replacement,
        )
        batches = self.loader.batches(self._requests(plan))
        self.logged_at, self.logged_images = time.monotonic(), self.position.clock.images
        try:
            for step in steps(self.stages, size, self.position):
                for turn in step.turns:
                    batch = _as_asked(turn.phase, next(batches))
                    self._add(self.engine.update(turn.phase, batch, step.clock))
                self.position = step.after
                self._at_intervals(step.clock, step.after.clock)
                self._stop_if_told()
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()

    def _requests(self, plan: Plan) -> Iterator[Request]:
        size, flip = self.experiment.batch_size, self.experiment.data.flip
        for step in steps(self.stages, size, self.position):
            for turn in step.turns:
                images = turn.phase.source == "images"
                rows = plan.rows(turn.stream, turn.draw, size)
                yield Request(turn.stream, turn.draw, rows, images=images, flip=flip and images)

    def _at_intervals(self, before: Clock, after: Clock) -> None:
        run, last = self.experiment.run, after.images >= self.total_images
        if _due(before, after, run.log_images) or last:
            self._log()
        if _due(before, after, run.evaluate_images) and self.judge is not None:
            self._validate()
        if _due(before, after, run.picture_images) or (last and run.picture_images):
            self._picture()
        if _due(before, after, run.checkpoint_images) and not last:
            self._save()

    def _add(self, report: Mapping[str, Tensor]) -> None:
        for name, value in report.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def _log(self) -> None:
        metrics = self.engine.mean({name: total / self.counts[name] for name, total in self.sums.items()})
        self.sums, self.counts = {}, {}
        now, clock = time.monotonic(), self.position.clock
        self.rate = rate = (clock.images - self.logged_images) / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_images = now, clock.images
        self._refuse_nonfinite(metrics)
        self.tracker.log({**metrics, "run/images_per_second": rate}, clock.images, clock.updates)
        if self.engine.is_main and self.watch:
            self.watch(Progress(clock, self.total_images, rate, metrics))

    def _refuse_nonfinite(self, metrics: Mapping[str, float]) -> None:
        for name, share in metrics.items():
            if name.endswith("/skipped") and share > 0:
                phase = name.removesuffix("/skipped")
                log.warning("%s: %.0f%% of the updates since the last log were not finite and left out", phase, 100 * share)
                if share >= 1:
                    shown = ", ".join(f"{k.split('/')[-1]} {v:g}" for k, v in metrics.items() if k.startswith(phase))
                    raise FloatingPointError(
                        f"{phase}: no update was finite up to {self.position.clock.images:,} images ({shown}); "
                        "nothing of them was kept. Lower the learning rate, or resume from an older checkpoint"
                    )

    def _save(self) -> None:
        state = self.engine.state()
        if self.writer:
            extra = {"position": self.position.to_dict(), "seed": self.experiment.seed, "config": self.experiment.to_dict()}
            self.writer.save(self.position.clock.images, state, extra)

    def _stop_if_told(self) -> None:
        clock = self.position.clock
        if self.engine.world_size > 1 and clock.updates % _STEPS_BETWEEN_AGREEMENTS:
            return
        if not self.engine.any(bool(self.stopped_by)):
            return
        self._save()
        if self.writer:
            self.writer.close()
        raise Interrupted(self.stopped_by or signal.SIGTERM, self.folder, clock.images)

    # --- looking at what it learnt ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _picture(self) -> None:
        """Rows of fixed validation records: original, reconstruction, and every attribute swapped."""
        if not self.engine.is_main or self.valid is None:
            return
        if not (isinstance(self.method, Encodes) and isinstance(self.method, Decodes)):
            return
        batch = self._valid_batch(_PICTURE_RECORDS)
        _stand_still(self.method)
        latent = self.method.encode(batch.images, batch.attributes)
        codes = [self.method.attributes.code(labels) for labels in _swaps(self.method, batch.attributes)]
        rows = [batch.images, *(self.method.decode(latent, code) for code in codes)]
        self.tracker.picture("sliders", png_bytes(grid(torch.stack(rows, 1).float().cpu())), self.position.clock.images)

    def _valid_batch(self, records: int) -> Batch:
        """Fixed records of the validation split, whole on this rank."""
        data = self.experiment.data
        loader = PillowLoader(
            self.valid, self.method.attributes, data.preprocessing(), seed=self.experiment.seed, device=self.engine.device
        )
        return next(iter(loader.batches(sequential(min(records, len(self.valid)), records))))

    def _validate(self) -> None:
        """Judge a fixed part of the validation split, each rank its share."""
        records = min(self.experiment.run.evaluate_records, len(self.valid))
        metrics = evaluation.quick(
            self.method,
            self.judge.method,
            self.valid_loader.batches(sequential(records, _VALIDATION_BATCH, "valid")),
            reduce_sum=self.engine.reduce_sum,
        )
        self.tracker.log(metrics, self.position.clock.images, self.position.clock.updates)
        if self.engine.is_main and self.watch:
            self.watch(Progress(self.position.clock, self.total_images, self.rate, metrics))


def _due(before: Clock, after: Clock, interval: int) -> bool:
    return bool(interval) and after.images // interval > before.images // interval


def _as_asked(phase: Phase, batch: Batch) -> Batch:
    """A phase that reads nothing gets its draws only."""
    if phase.source is not None:
        return batch
    return dataclasses.replace(batch, attributes=batch.attributes[:, :0], known=batch.known[:0])


def _swaps(method: Method, labels: Tensor) -> Iterator[Tensor]:
    """The labels themselves, then for each attribute every record moved to another value of it."""
    yield labels
    for attribute in method.attributes:
        label = labels[:, method.attributes.index(attribute.name)]
        for step in range(1, attribute.k):
            value = 1 - label if attribute.kind == "continuous" else (label.clamp(min=0) + step) % attribute.k
            swapped = labels.clone()
            swapped[:, method.attributes.index(attribute.name)] = value
            yield swapped


def _stand_still(method: Method) -> None:
    for network in method.networks.values():
        network.eval()


class _signals_into:
    """While it lasts SIGINT and SIGTERM set `run.stopped_by`; the loop ends at a step boundary. A third one ends at once."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.received = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received += 1
        self.run.stopped_by = self.run.stopped_by or number
        if self.received >= 3:
            raise KeyboardInterrupt


def commit() -> str:
    """The commit of the code that runs, with "+changes" when the checkout has some; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
