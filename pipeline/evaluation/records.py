"""The records of a split, read batch by batch by the processes that evaluate together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fader.method import Batch
from pipeline.data.shards import Split
from pipeline.evaluation.specification import Specification
from pipeline.loading.loader import Loader
from pipeline.loading.pillow import PillowLoader
from pipeline.loading.plan import sequential
from pipeline.models import Model


class Processes(Protocol):
    """The processes that evaluate together, as `pipeline.engine.Ranks` knows them."""

    rank: int
    world_size: int

    def reduce_sum(self, tensor: Tensor) -> Tensor: ...


class OneProcess:
    """A process that evaluates alone."""

    rank, world_size = 0, 1

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Records:
    """Reads the first records of a split, this rank's share of them, in whole batches, so that the result of a record
    cannot depend on the number of ranks. open_loader: gives a loader whose batches are whole. progress: called with
    (records read by this rank, records that it reads in all).
    """

    batch_size: int
    ranks: Processes
    open_loader: Callable[[Split], Loader]
    progress: Callable[[int, int], None] | None = None

    def read(self, split: Split, records: int, each: Callable[[Batch], None]) -> None:
        requests = list(sequential(records, self.batch_size))[self.ranks.rank :: self.ranks.world_size]
        if not requests:
            return
        done, total = 0, sum(len(request.rows) for request in requests)
        for batch in self.open_loader(split).batches(iter(requests)):
            with torch.inference_mode():
                each(batch)
            done += len(batch.index)
            if self.progress:
                self.progress(done, total)


def pillow_loader(model: Model, specification: Specification) -> Callable[[Split], Loader]:
    device = torch.device(specification.device)
    return lambda split: PillowLoader(
        split, model.attributes, model.preprocessing,
        seed=specification.seed, device=device, threads=specification.threads,
    )  # fmt: skip
