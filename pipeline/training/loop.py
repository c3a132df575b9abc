"""Train a run from where it stands to its end: its steps, and what happens between them."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fader.method import Batch, Clock
from pipeline.images import grid, png_bytes
from pipeline.training.assembly import Run
from pipeline.training.interruption import Interrupted, Reason
from pipeline.training.recovery import NonFinite, Recovery
from pipeline.training.steps import steps, total_images
from pipeline.training.validation import Measured

log = logging.getLogger(__name__)

_STEPS_BETWEEN_AGREEMENTS = 4


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


class Loop:
    """Trains a run. watch: called on the main rank at each log interval."""

    def __init__(self, run: Run, watch: Callable[[Progress], None] | None = None) -> None:
        self.run, self.watch = run, watch
        self.recovery, self.images_per_second = Recovery(run), 0.0
        self.total_images = total_images(run.stages, run.experiment.batch_size)
        self.measured = Measured()

    def to_the_end(self) -> None:
        """Make every step that is left, from a checkpoint again where updates ceased to be finite, and save the end."""
        while True:
            try:
                self._steps()
                break
            except NonFinite as fault:
                self.recovery.go_back(fault)
        self._save(finished=True)

    def _steps(self) -> None:
        run, first = self.run, self.run.point.position.clock
        self._interval, self._waiting = (time.monotonic(), first.images), 0.0
        with contextlib.closing(run.batches.after(run.point)) as batches:
            for step in steps(run.stages, run.experiment.batch_size, run.point.position):
                if self._is_stalled():
                    break
                for turn in step.turns:
                    run.watchdog.at(f"batch {turn.draw} of {turn.stream}", slow=step.clock == first)
                    batch = self._waited(batches)
                    run.watchdog.at(f"update {turn.draw} of {turn.stream}", slow=step.clock == first)
                    run.engine.update(turn.phase, batch, step.clock)
                run.point.position = step.after
                self._at_intervals(step.clock, step.after.clock)
                self._end_if_told(step.after.clock)

    def _waited(self, batches: Iterator[Batch]) -> Batch:
        began = time.monotonic()
        batch = next(batches)
        self._waiting += time.monotonic() - began
        return batch

    def _at_intervals(self, before: Clock, after: Clock) -> None:
        settings, last = self.run.experiment.run, after.images >= self.total_images
        if _is_due(before, after, settings.log_images) or last:
            self._log(after)
        better = _is_due(before, after, settings.evaluate_images) and self._validate(after)
        if _is_due(before, after, settings.picture_images) or (last and settings.picture_images):
            self._show(after)
        measured = self.measured.images == after.images
        if better or (measured and settings.keep_best) or (_is_due(before, after, settings.checkpoint_images) and not last):
            self._save(better)

    def _log(self, clock: Clock) -> None:
        run = self.run
        metrics, counts = run.engine.read_report()  # waits for the device
        began, images = self._interval
        self._interval = time.monotonic(), clock.images
        seconds = max(self._interval[0] - began, 1e-9)
        self.images_per_second, waiting, self._waiting = (clock.images - images) / seconds, self._waiting / seconds, 0.0
        self.recovery.check(metrics, counts)
        left_out = run.point.quarantine = run.loaders.left_out(run.point.quarantine)
        rate = {
            "run/images_per_second": self.images_per_second,
            "run/waiting_share": waiting,  # of the main rank's time, for batches
            "data/quarantined": float(len(left_out)),
        }
        run.tracker.log({**metrics, **rate}, clock.images, clock.updates)
        run.loaders.check(left_out)
        self._tell(clock, metrics)

    def _tell(self, clock: Clock, metrics: Mapping[str, float]) -> None:
        if self.run.engine.is_main and self.watch:
            self.watch(Progress(clock, self.total_images, self.images_per_second, metrics))

    def _validate(self, clock: Clock) -> bool:
        """Measure part of the validation split; return whether it is the best so far."""
        assert self.run.validation and self.run.best_so_far
        self.run.watchdog.at("its validation", slow=True)
        self.measured = self.run.validation.measure(clock.images)
        self.run.tracker.log(self.measured.to_log(), clock.images, clock.updates)
        self._tell(clock, self.measured.to_log())
        return self.run.best_so_far.note(self.measured)

    def _show(self, clock: Clock) -> None:
        """Show rows of fixed validation records: original, reconstruction, and every attribute swapped."""
        assert self.run.validation
        self.run.watchdog.at("its pictures", slow=True)
        rows = self.run.validation.pictures() if self.run.engine.is_main else None
        if rows is not None:
            self.run.tracker.picture("sliders", png_bytes(grid(rows)), clock.images)

    def _save(self, better: bool = False, finished: bool = False) -> None:
        """Write a checkpoint, with what validation measured of this very state where it did.
        better: validation found it the best so far. finished: nothing comes after it."""
        run, point, best_so_far = self.run, self.run.point, self.run.best_so_far
        run.watchdog.at("its checkpoint", slow=True)
        point.quarantine = run.loaders.left_out(point.quarantine)
        state = run.engine.state()
        if run.writer is None:
            return
        point.validation = best_so_far.state() if best_so_far else None
        about = {"seed": run.experiment.seed, "config": run.experiment.to_dict(), "finished": finished}
        metrics = self.measured.metrics if self.measured.images == run.images else None
        best = best_so_far.about_best() if best_so_far and better else None
        run.writer.save(run.images, state, {**point.to_dict(), **about}, metrics, best)

    def _end_if_told(self, clock: Clock) -> None:
        """Save, and raise Interrupted, when any rank was told to end; ranks agree on it every few steps."""
        run = self.run
        if run.engine.world_size > 1 and clock.updates % _STEPS_BETWEEN_AGREEMENTS:
            return
        run.watchdog.at("agreeing whether to go on")
        reason = Reason(int(run.engine.largest(run.listener.heard())))
        if reason is Reason.NONE:
            return
        self._save()
        if run.writer:
            run.writer.close()
        raise Interrupted(reason, run.folder, clock.images)

    def _is_stalled(self) -> bool:
        """Return whether validation has not been better for as long as the run's patience lasts."""
        best_so_far = self.run.best_so_far
        stalled = best_so_far is not None and best_so_far.stalled(self.run.images)
        if stalled and self.run.engine.is_main:
            log.info("no better %s: training ends", best_so_far.patience_metric)
        return stalled


def _is_due(before: Clock, after: Clock, interval: int) -> bool:
    return bool(interval) and after.images // interval > before.images // interval
