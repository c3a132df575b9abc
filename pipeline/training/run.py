"""The loop: stages of phases, the clock, checkpoints, ends and returns. Every rank runs it and makes the same steps."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fader.method import Batch, Clock, Phase
from pipeline import models
from pipeline.config import Experiment, build_method
from pipeline.data.balance import balanced_weights
from pipeline.data.shards import ShardSet, Split
from pipeline.engine import Engine, State
from pipeline.files import write_whole
from pipeline.images import grid, png_bytes
from pipeline.loading.cache import Cache
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, Request, TarPlan, salted
from pipeline.loading.quarantine import Quarantine
from pipeline.models import checkpoint
from pipeline.tracking import Tracker, open_tracker
from pipeline.training import watchdog
from pipeline.training.interruption import STOP_FILE, Interrupted, Listener, Reason
from pipeline.training.retention import CheckpointWriter
from pipeline.training.steps import Position, steps
from pipeline.training.validation import BestSoFar, Measured, Validation
from pipeline.training.watchdog import Watchdog

log = logging.getLogger(__name__)

_STEPS_BETWEEN_AGREEMENTS = 4
_PICTURE_RECORDS = 6


class NonFinite(FloatingPointError):
    """Too many updates were not finite. None of them changed anything."""


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
        Interrupted: a signal or a stop file ended it (see `pipeline.training.interruption`); everything is saved.
        FloatingPointError: updates were not finite, again and again after the run went back to a checkpoint.
        OSError: the last checkpoint could not be saved.
    """
    with Listener() as listener:
        return _Run(experiment, run, resume, watch, listener).go()


class _Run:
    """One process's part of a run, from its parts to its end."""

    def __init__(
        self,
        experiment: Experiment,
        run: Path,
        resume: bool,
        watch: Callable[[Progress], None] | None,
        listener: Listener,
    ) -> None:
        self.experiment, self.folder, self.watch, self.listener = experiment, run, watch, listener
        shards = ShardSet.open(experiment.data.path)
        self.split = shards.split("train")
        torch.manual_seed(experiment.seed)
        self.method = build_method(experiment, shards.attributes)
        self.stages = self.method.stages()
        self.total_images = sum(-(-s.images // experiment.batch_size) * experiment.batch_size for s in self.stages)
        self._check_folder(resume, shards)
        judge = models.load(experiment.judge) if experiment.judge and experiment.run.evaluate_images else None
        self.engine = Engine(
            self.method, precision=experiment.precision, seed=experiment.seed, settings=experiment.engine
        )
        self.plan = self._make_plan()
        self._check_batch_size()
        self.quarantine: list[str] = []  # keys that any rank left out; by split the records that this one did
        self.quarantines: dict[str, Quarantine] = {}
        self.validation: Validation | None = None
        if experiment.run.evaluate_images or experiment.run.picture_images:
            self.validation = Validation(experiment, self.engine, judge, shards, self._open_whole)
        self.position = Position()
        self.salt = 0  # how often the run went back: it then sees other batches
        if resume:
            self._tell_of_other_ranks()
            self._restore()
        self.started_at = self.sound_at = self.position.clock.images
        self.partly_known = bool((self.split.columns(self.method.attributes) < 0).any())
        self.engine.wait()
        self.loader = self._open_loader(self.split, experiment.data.cache)
        self._open_folder(shards)
        self.rate = 0.0
        self.nonfinite: dict[str, int] = {}
        self.measured = Measured()

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

    def _make_plan(self, salt: int = 0) -> Plan | TarPlan:
        data = self.experiment.data
        if data.loader == "sequential":
            return TarPlan(self.split.shard, self.experiment.seed, salt, self.engine.world_size)
        weights, groups = balanced_weights(self.split, data.balance) if data.balance else (None, None)
        return Plan(
            len(self.split),
            self.experiment.seed,
            salt,
            window=data.window,
            shard_of=self.split.shard,
            replacement=data.replacement,
            weights=weights,
            groups=groups,
        )

    def _tell_of_other_ranks(self) -> None:
        """The plan's order is the same on any number of ranks, that of whole tars is not."""
        if self.experiment.data.loader == "sequential" and self.engine.is_main:
            before = json.loads((self.folder / "run.json").read_text())["world_size"]
            if before != self.engine.world_size:
                log.warning(
                    "data.loader sequential: the run was on %d ranks and goes on with %d, which read other tars: of "
                    "the epoch under way some records may be read twice and others not; the next epochs are whole",
                    before, self.engine.world_size,
                )  # fmt: skip

    def _restore(self, up_to: float = math.inf) -> bool:
        """Go to the newest sound checkpoint, which the main rank chooses for all; False when there is none."""
        newest = checkpoint.latest(self.folder, up_to) if self.engine.is_main else None
        images = int(self.engine.largest(-1 if newest is None else checkpoint.images_of(newest)))
        if images < 0:
            return False
        state, extra = checkpoint.read(checkpoint.at(self.folder, images))
        self.engine.load(state)
        if extra["format"] < 2 and self.engine.is_main:
            log.warning(
                "%s was begun by an earlier version: flips, noise and swaps are drawn anew from here on, so it will not "
                "repeat an unbroken run of that version", self.folder,
            )  # fmt: skip
        self.position = Position.from_dict(extra["position"])
        self.salt = extra.get("salt", 0)
        self.quarantine = extra.get("quarantine", [])
        if self.best_so_far:
            self.best_so_far.load(extra.get("validation"))
        return True

    @property
    def best_so_far(self) -> BestSoFar | None:
        return self.validation.best_so_far if self.validation else None

    def _open_whole(self, split: Split) -> Loader:
        """A loader that gives this rank whole batches."""
        data = self.experiment.data
        return open_loader(
            data.loader,
            "none",
            split=split,
            attributes=self.method.attributes,
            preprocessing=data.preprocessing(),
            seed=self.experiment.seed,
            device=self.engine.device,
            threads=data.threads,
            quarantine=self._quarantine_of(split),
        )

    def _open_loader(self, split: Split, cache: Cache) -> Loader:
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
            on_node=self.engine.on_node,
            quarantine=self._quarantine_of(split),
        )

    def _quarantine_of(self, split: Split) -> Quarantine:
        if split.name not in self.quarantines:
            self.quarantines[split.name] = Quarantine(split, self.experiment.data.quarantine_share, self.quarantine)
        return self.quarantines[split.name]

    def _open_folder(self, shards: ShardSet) -> None:
        """The main rank writes what the run is, and opens its tracker."""
        experiment = self.experiment
        self.tracker: Tracker = open_tracker(
            experiment.tracking.enabled, self.folder, experiment.tracking.experiment, experiment.name, self.engine.is_main,
            node=self.engine.node, local_main=self.engine.is_local_main,
        )  # fmt: skip
        self.writer: CheckpointWriter | None = None
        if not self.engine.is_main:
            self.tracker.start()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        card = {
            "name": experiment.name,
            "method": experiment.method_name,
            "attributes": self.method.attributes.to_list(),
            "data_digest": shards.digest,
            "data": {"name": shards.name, "records": {split: entry["records"] for split, entry in shards.info["splits"].items()}},
            "config_digest": experiment.digest,
            "commit": commit(),
            "world_size": self.engine.world_size,
            "backend": self.engine.backend,
        }
        self.listener.look_for(self.folder / STOP_FILE)
        write_whole(self.folder / "config.yaml", experiment.dump())
        write_whole(self.folder / "run.json", json.dumps(card, indent=1))
        run = experiment.run
        self.writer = CheckpointWriter(self.folder, run.keep, every_images=run.keep_every_images, best=run.keep_best)
        watchdog.clear(self.folder)
        self.tracker.start(self.started_at)
        self.tracker.params(experiment.to_dict())
        self.tracker.tags({key: str(value) for key, value in card.items() if key != "attributes"})
        if experiment.tracking.parent:
            self.tracker.tags({"mlflow.parentRunId": experiment.tracking.parent})
        self.tracker.artifact(self.folder / "config.yaml")

    # --- the loop ---------------------------------------------------------------------------------------------------

    def go(self) -> Path:
        status = "FAILED"
        self.watchdog = Watchdog(
            self.folder,
            self.engine.rank,
            self.engine.world_size,
            self.experiment.run.watchdog_minutes,
            tell=lambda text: self.tracker.tags({"hung": text}),
        )
        try:
            with self.watchdog:
                self._loop_and_return()
                self._save(finished=True)
                if self.writer:
                    self.writer.close()
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            self.tracker.finish(status)
        return self.folder

    def _loop_and_return(self) -> None:
        """The loop to its end, from the last good checkpoint again where updates ceased to be finite."""
        while True:
            try:
                return self._loop()
            except NonFinite as fault:
                if self.salt >= self.experiment.run.rollbacks:
                    if self.writer:  # what a resume finds is from before the trouble
                        self.writer.wait()
                        self.writer.forget_after(self.sound_at)
                    raise
                self._go_back(fault)

    def _loop(self) -> None:
        size = self.experiment.batch_size
        self.plan = self._make_plan(self.salt)
        self.loader.seed = self.engine.seed = salted(self.experiment.seed, self.salt)
        batches = self.loader.batches(self._requests())
        self.logged_at, self.logged_images = time.monotonic(), self.position.clock.images
        first = self.position.clock
        try:
            for step in () if self._stalled() else steps(self.stages, size, self.position):
                for turn in step.turns:
                    self.watchdog.at(f"batch {turn.draw} of {turn.stream}", slow=step.clock == first)
                    batch = self._as_asked(turn.phase, next(batches))
                    self.watchdog.at(f"update {turn.draw} of {turn.stream}", slow=step.clock == first)
                    self.engine.update(turn.phase, batch, step.clock)
                self.position = step.after
                self._at_intervals(step.clock, step.after.clock)
                self._stop_if_told()
                if self._stalled():
                    break
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()

    def _requests(self) -> Iterator[Request]:
        size, data = self.experiment.batch_size, self.experiment.data
        for step in steps(self.stages, size, self.position):
            for turn in step.turns:
                images = turn.phase.source == "images"
                rows = self.plan.rows(turn.stream, turn.draw, size)
                yield Request(turn.stream, turn.draw, rows, images=images, flip=data.flip, augment=data.augment)

    def _as_asked(self, phase: Phase, batch: Batch) -> Batch:
        """A phase that reads nothing gets its draws only; one that reads pictures the labels of those that decode."""
        if phase.source is None:
            return dataclasses.replace(batch, attributes=batch.attributes[:, :0], known=batch.known[:0])
        if phase.source == "images" and self.partly_known and self.engine.world_size > 1:
            return self.engine.count_known(batch)
        return batch

    def _at_intervals(self, before: Clock, after: Clock) -> None:
        run, last = self.experiment.run, after.images >= self.total_images
        if _due(before, after, run.log_images) or last:
            self._log()
        better = _due(before, after, run.evaluate_images) and self._validate()
        if _due(before, after, run.picture_images) or (last and run.picture_images):
            self.watchdog.at("its pictures", slow=True)
            self._picture()
        measured = self.measured.images == after.images
        if better or (measured and run.keep_best) or (_due(before, after, run.checkpoint_images) and not last):
            self._save(better)

    def _log(self) -> None:
        metrics, counts = self.engine.read_report()
        now, clock = time.monotonic(), self.position.clock
        self.rate = rate = (clock.images - self.logged_images) / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_images = now, clock.images
        self._refuse_nonfinite(metrics, counts)
        self._gather_quarantine()
        more = {"run/images_per_second": rate, "data/quarantined": float(len(self.quarantine))}
        self.tracker.log({**metrics, **more}, clock.images, clock.updates)
        for quarantine in self.quarantines.values():
            quarantine.check(quarantine.count(self.quarantine))
        if self.engine.is_main and self.watch:
            self.watch(Progress(clock, self.total_images, rate, metrics))

    def _refuse_nonfinite(self, metrics: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Counts since the last log at which all was finite. Ranks see the same means, so all refuse alike."""
        left_out = {name: share for name, share in metrics.items() if name.endswith("/skipped") and share > 0}
        self.nonfinite = {name: self.nonfinite.get(name, 0) + round(share * counts[name]) for name, share in left_out.items()}
        for name, number in self.nonfinite.items():
            phase = name.removesuffix("/skipped")
            log.warning("%s: %d updates were not finite lately and left out", phase, number)
            if number >= self.experiment.run.nonfinite_updates:
                shown = ", ".join(f"{k.split('/')[-1]} {v:g}" for k, v in metrics.items() if k.startswith(phase))
                raise NonFinite(
                    f"{phase}: {number} updates up to {self.position.clock.images:,} images were not finite ({shown}) "
                    f"and left out, after {self.salt} returns to an older checkpoint: lower the learning rate"
                )
        if not left_out:
            self.sound_at = self.position.clock.images

    def _gather_quarantine(self) -> None:
        """The main rank hears what every rank has left out; a rank itself goes by its own list (see `quarantine`)."""
        found = [key for quarantine in self.quarantines.values() for key in quarantine.keys]
        self.quarantine = self.engine.union([*self.quarantine, *found])

    def _go_back(self, fault: NonFinite) -> None:
        """To the last checkpoint from before the trouble, or to the start; from there on with other batches."""
        salt, came_to = self.salt + 1, self.position.clock.images
        if self.writer:
            self.writer.wait()
        if not self._restore(self.sound_at):
            self.engine.load(self._first_state())
            self.position = Position()
            if self.best_so_far:
                self.best_so_far.load(None)
        self.salt = salt
        self.sound_at = images = self.position.clock.images
        self.nonfinite = {}
        if self.writer:
            self.writer.forget_after(images)
        self._forget_a_best_that_is_gone()
        text = f"went back from {came_to:,} to {images:,} images, salt {salt}: {fault}"
        log.warning("%s", text)
        self.tracker.rewound(images, str(fault))
        self.tracker.tags({"rollbacks": salt, f"rollback.{salt}": text})

    def _forget_a_best_that_is_gone(self) -> None:
        """The best before the return may have made way for one after it, which then went, too: the next validation is best."""
        best = self.best_so_far and self.best_so_far.best
        if best:
            there = [checkpoint.images_of(path) for path in checkpoint.kept(self.folder)] if self.engine.is_main else []
            if self.engine.largest(self.engine.is_main and best.images not in there):
                self.best_so_far.best = None

    def _first_state(self) -> State:
        """The weights that the seed gives, and optimizers that have seen nothing."""
        torch.manual_seed(self.experiment.seed)
        networks = build_method(self.experiment, self.method.attributes).networks
        weights = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
        return State(weights, weights, {})

    def _save(self, better: bool = False, finished: bool = False) -> None:
        """Write a checkpoint, with what validation measured of this very state where it did.

        Args:
            better: validation found it the best so far.
            finished: nothing comes after it.
        """
        self.watchdog.at("its checkpoint", slow=True)
        self._gather_quarantine()
        state = self.engine.state()
        if self.writer:
            extra = {
                "position": self.position.to_dict(),
                "seed": self.experiment.seed,
                "salt": self.salt,
                "quarantine": self.quarantine,
                "config": self.experiment.to_dict(),
                "finished": finished,
            }
            if self.best_so_far:
                extra["validation"] = self.best_so_far.state()
            best = self.best_so_far.about_best() if better else None
            images = self.position.clock.images
            metrics = self.measured.metrics if self.measured.images == images else None
            self.writer.save(images, state, extra, metrics, best)

    def _stop_if_told(self) -> None:
        clock = self.position.clock
        if self.engine.world_size > 1 and clock.updates % _STEPS_BETWEEN_AGREEMENTS:
            return
        self.watchdog.at("agreeing whether to go on")
        reason = Reason(int(self.engine.largest(self.listener.heard())))
        if reason is Reason.NONE:
            return
        self._save()
        if self.writer:
            self.writer.close()
        raise Interrupted(reason, self.folder, clock.images)

    def _stalled(self) -> bool:
        """Whether validation has not been better for as long as the run's patience lasts."""
        stalled = bool(self.best_so_far) and self.best_so_far.stalled(self.position.clock.images)
        if stalled and self.engine.is_main:
            log.info("no better %s: training ends", self.best_so_far.patience_metric)
        return stalled

    # --- what it learnt ---------------------------------------------------------------------------------------------

    def _picture(self) -> None:
        """Show rows of fixed validation records: original, reconstruction, and every attribute swapped."""
        assert self.validation
        rows = self.validation.pictures() if self.engine.is_main else None
        if rows is not None:
            self.tracker.picture("sliders", png_bytes(grid(rows)), self.position.clock.images)

    def _validate(self) -> bool:
        """Measure part of the validation split; return whether it is the best so far."""
        assert self.validation and self.best_so_far
        self.watchdog.at("its validation", slow=True)
        clock = self.position.clock
        self.measured = self.validation.measure(clock.images)
        self.tracker.log(self.measured.to_log(), clock.images, clock.updates)
        if self.engine.is_main and self.watch:
            self.watch(Progress(clock, self.total_images, self.rate, self.measured.to_log()))
        return self.best_so_far.note(self.measured)


def _due(before: Clock, after: Clock, interval: int) -> bool:
    return bool(interval) and after.images // interval > before.images // interval


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
