"""Write a run's checkpoints in the background, remove those that need not be kept, and go back to one."""

import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pipeline.engine import Engine, State
from pipeline.models import checkpoint
from pipeline.ownership import Owner
from pipeline.training.steps import ResumePoint

log = logging.getLogger(__name__)


def restore(engine: Engine, run: Path, seed: int, up_to: float = math.inf) -> ResumePoint | None:
    """Load the newest sound checkpoint of at most `up_to` images seen, which the main rank chooses for all.
    Returns: Where the run stood, or None when there is no such checkpoint.
    seed: the experiment's, which the engine's is no longer after a return to an older checkpoint.
    Raises ValueError: this rank does not see what the main rank chose; or the run began with another seed."""
    newest = checkpoint.latest(run, up_to) if engine.is_main else None
    images = int(engine.largest(-1 if newest is None else checkpoint.images_of(newest)))
    if images < 0:
        return None
    chosen = checkpoint.at(run, images)
    if chosen is None:
        raise ValueError(f"{run} has no checkpoint at {images:,} images here; all ranks must see the same folder")
    state, extra = checkpoint.read(chosen)
    if (began := extra.get("seed", seed)) != seed:
        why = f"its weights started from seed {began}, which says who may judge it"
        raise ValueError(f"{run} cannot go on with seed {seed}: {why}; resume it with seed={began}, or start a new run")
    engine.load(state)
    if extra["format"] < 2 and engine.is_main:
        log.warning(
            "%s was begun by an earlier version: flips, noise and swaps are drawn anew from here on, so it will not "
            "repeat an unbroken run of that version", run,
        )  # fmt: skip
    return ResumePoint.from_dict(extra)


class CheckpointWriter:
    """Writes checkpoints one at a time while training goes on.
    A failed write is reported and training goes on with the older ones intact; `close` raises when the last one failed.
    keep: how many of the newest are kept. every_images: beside them the first one of each so many images is kept; 0 = none.
    best: beside them the best by each of these metrics is kept. owner: this process as the owner of the run's folder."""

    def __init__(
        self, run: Path, keep: int, *, every_images: int = 0, best: Mapping[str, Literal["max", "min"]] | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.run, self.owner = run, owner
        self.keep, self.every_images, self.best = keep, every_images, dict(best or {})
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._error: BaseException | None = None
        checkpoint.clear_unfinished(run)

    def save(
        self, images: int, state: State, extra: Mapping[str, Any], metrics: Mapping[str, float] | None = None,
        validated_best: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a state (a copy that nobody changes) and write it in the background; wait for the one before.
        extra, metrics: as `checkpoint.write` takes them.
        validated_best: what is known of it when validation found it the best so far; it is then kept until a better one comes.
        Raises ValueError: another process took the folder over while this one stood still."""

        def write() -> Path:
            written = checkpoint.write(self.run, images, state, extra, metrics)
            if validated_best is not None:
                checkpoint.note_best(self.run, images, validated_best)
            for path in self._superfluous(images):
                checkpoint.remove(path)
            return written

        self.wait()
        if self.owner:
            self.owner.check()
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        if self._pending is None:
            return
        try:
            path = self._pending.result()
            self._error = None
            log.info("checkpoint %s", path)
        except OSError as error:
            self._error = error
            log.error("checkpoint not saved: %s; older ones are intact and training goes on", error)
        finally:
            self._pending = None

    def close(self) -> None:
        """Wait for the last one; raise OSError where it could not be saved."""
        self.wait()
        self._pool.shutdown()
        if self._error is not None:
            newest = checkpoint.latest(self.run)
            left = f"{newest} is the newest there is" if newest else "there is none"
            raise OSError(f"the last checkpoint could not be saved: {self._error}; {left}") from self._error

    def forget_after(self, images: int) -> None:
        """Remove what stands past `images` seen, because the run goes back there and on from there in another way."""
        self.wait()
        for path in checkpoint.kept(self.run):
            if checkpoint.images_of(path) > images:
                checkpoint.remove(path)

    def _superfluous(self, images: int) -> list[Path]:
        """Return what need not be kept once that of `images` is written; those past it were damaged when the run resumed."""
        everything = checkpoint.kept(self.run)
        past = [path for path in everything if checkpoint.images_of(path) <= images]
        kept = [*past[: self.keep], checkpoint.validated(self.run)]
        for metric, mode in self.best.items():
            kept += checkpoint.by_metric(past, metric, mode)[:1]
        if self.every_images:
            firsts = {checkpoint.images_of(path) // self.every_images: path for path in past}  # the earliest comes last
            kept += [path for quotient, path in firsts.items() if quotient]
        return [path for path in everything if path not in kept]
