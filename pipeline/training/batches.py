"""Say which batches the updates of a run read, and open the loaders that make them."""

import dataclasses
from collections.abc import Iterable, Iterator

from fader.method import Batch, Phase
from pipeline.config import Experiment
from pipeline.data.balance import balanced_weights
from pipeline.data.shards import Split
from pipeline.engine import Engine
from pipeline.loading.cache import Cache
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, Request, salted
from pipeline.loading.quarantine import Quarantine
from pipeline.training.steps import ResumePoint, Turn, steps


class Loaders:
    """Opens a run's splits, each with a quarantine for records that do not decode.
    known: keys of those that are known already."""

    def __init__(self, experiment: Experiment, engine: Engine, known: Iterable[str]) -> None:
        self.experiment, self.engine, self.known = experiment, engine, list(known)
        self.quarantines: dict[str, Quarantine] = {}

    def open(self, split: Split, cache: Cache = "none", whole: bool = False) -> Loader:
        """Open a split. whole: this rank gets whole batches instead of its share of each."""
        data, engine = self.experiment.data, self.engine
        if split.name not in self.quarantines:
            self.quarantines[split.name] = Quarantine(split, data.quarantine_share, self.known)
        return open_loader(
            data.loader, cache, split=split, attributes=engine.method.attributes, preprocessing=data.preprocessing(),
            seed=self.experiment.seed, device=engine.device, threads=data.threads, prefetch=data.prefetch,
            quarantine=self.quarantines[split.name],
            **({} if whole else {"rank": engine.rank, "world_size": engine.world_size, "on_node": engine.on_node}),
        )

    def left_out(self, known: Iterable[str]) -> list[str]:
        """Return the keys of all records that any rank has left out, and those known before; all ranks call it together.
        A rank itself goes by its own list (see `quarantine`)."""
        mine = [key for quarantine in self.quarantines.values() for key in quarantine.keys]
        return self.engine.union([*known, *mine])

    def check(self, left_out: Iterable[str]) -> None:
        """Raise ValueError when a split has more of them than data.quarantine_share allows."""
        for quarantine in self.quarantines.values():
            quarantine.check(quarantine.count(left_out))


class Batches:
    """The batches of a run's training split, in the order in which updates read them.
    Raises ValueError: data.balance or data.window does not fit the split."""

    def __init__(self, experiment: Experiment, engine: Engine, split: Split, loaders: Loaders) -> None:
        self.experiment, self.engine, self.split, self.loaders = experiment, engine, split, loaders
        data, method = experiment.data, engine.method
        self.stages = method.stages()
        self._weights = balanced_weights(split, data.balance) if data.balance else (None, None)
        self._partly_known = bool((split.columns(method.attributes) < 0).any())
        self._plan(0)
        self.loader: Loader | None = None

    def open(self) -> None:
        """Open the loader. It may fill a cache first, which takes its time."""
        self.loader = self.loaders.open(self.split, self.experiment.data.cache)

    def after(self, point: ResumePoint) -> Iterator[Batch]:
        """Give the batch of each update that is left; closing the iterator ends all work begun for it."""
        assert self.loader is not None
        self.loader.seed = self.engine.seed = salted(self.experiment.seed, point.salt)
        return self._after(self.loader.batches(self._requests(point)), point)

    def _after(self, batches: Iterator[Batch], point: ResumePoint) -> Iterator[Batch]:
        try:
            for turn, batch in zip(self._turns(point), batches):
                yield self._as_asked(turn.phase, batch)
        finally:
            batches.close()

    def _turns(self, point: ResumePoint) -> Iterator[Turn]:
        for step in steps(self.stages, self.experiment.batch_size, point.position):
            yield from step.turns

    def _requests(self, point: ResumePoint) -> Iterator[Request]:
        size, data, plan = self.experiment.batch_size, self.experiment.data, self._plan(point.salt)
        for turn in self._turns(point):
            rows = plan.rows(turn.stream, turn.draw, size)
            images = turn.phase.source == "images"
            yield Request(turn.stream, turn.draw, rows, images=images, flip=data.flip, augment=data.augment)

    def _plan(self, salt: int) -> Plan:
        data, seed = self.experiment.data, self.experiment.seed
        weights, groups = self._weights
        return Plan(
            len(self.split), seed, salt, window=data.window, shard_of=self.split.shard, replacement=data.replacement,
            weights=weights, groups=groups,
        )

    def _as_asked(self, phase: Phase, batch: Batch) -> Batch:
        """Give a phase that reads nothing its draws only, and one that reads pictures the labels of those that decode."""
        if phase.source is None:
            return dataclasses.replace(batch, attributes=batch.attributes[:, :0], known=batch.known[:0])
        if phase.source == "images" and self._partly_known and self.engine.world_size > 1:
            return self.engine.count_known(batch)
        return batch
