"""One prepared update of a phase: the same kernels on the same memory every time, so that a CUDA graph may hold it.

What changes from update to update is a tensor that stays where it is: the batch, learning rates, weights of schedules.
The host writes them, and seeds dropout, before the step runs; the step itself asks nothing of the host.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fader.draws import Draws
from fader.method import Batch, Context, Loss, Phase
from pipeline.engine.groups import Group


def _tensors(batch: Batch) -> list[Tensor | None]:
    return [batch.images, batch.attributes, batch.index, batch.draws.key, batch.size, batch.known]


def shape_of(batch: Batch) -> Hashable:
    """What batches must have in common to be read from the same memory: shapes, orders in memory and types."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in _tensors(batch))


def like(batch: Batch, device: torch.device) -> Batch:
    """Memory for batches of one shape. It holds none of the numbers that are for the host alone."""
    images, attributes, index, key, size, known = (
        None if t is None else torch.empty_like(t, device=device) for t in _tensors(batch)
    )
    return Batch(images, attributes, index, Draws(key, index, host_key=0), size, known, records=0)


class Sums:
    """What a phase reports, summed on the device. updates: how many updates are in the sums."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: tuple[str, ...] = ()
        self.total = torch.zeros(0, dtype=torch.float64, device=device)
        self.updates = 0

    def add(self, report: Mapping[str, Tensor]) -> None:
        if not self.names and report:
            self.names = tuple(report)
            self.total = torch.zeros(len(report), dtype=torch.float64, device=self.device)
        assert tuple(report) == self.names, f"a report of {tuple(report)} after one of {self.names}"
        if report:
            self.total += torch.stack(list(report.values()))

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """Each sum by its name; the sums begin anew."""
        if self.updates:
            yield from zip(self.names, self.total.clone().unbind())
            self.total.zero_()


class Guard:
    """Buffers that an update moves, as they were before it, to be put back where the update was not finite.
    These are the running statistics of networks in train mode. A network without parameters looks on and guards its own sums,
    which may be large."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        buffers = [b for network in networks if any(True for _ in network.parameters()) for b in network.buffers()]
        self.buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype: None for b in buffers}]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        self.kept = [_flat(buffers) for buffers in self.buffers]

    def restore(self, finite: Tensor) -> None:
        """finite: 1 leaves the buffers, 0 gives them their kept values."""
        for buffers, old in zip(self.buffers, self.kept):
            right = torch.where(finite > 0, _flat(buffers), old).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(right, buffers)])
        self.kept = []


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@dataclass(eq=False, kw_only=True)
class Step:
    """One update of a phase on batches of one shape.

    phase: what to do. group: what it trains; None for a phase that only refreshes statistics.
    inputs: the memory that batches are copied to. networks: all of the method's, standing as the phase asks when the step runs.
    context: what the loss may know of the world. sums: where the reports go.
    autocast: for a phase without a group, whose loss is not wrapped. accumulation: parts in which the batch is taken.
    average: makes running statistics that each rank keeps of its own share their mean over ranks.
    """

    phase: Phase
    group: Group | None
    inputs: Batch
    networks: nn.ModuleDict
    context: Context
    sums: Sums
    autocast: Callable[[], contextlib.AbstractContextManager]
    accumulation: int
    average: Callable[[], None]

    def __post_init__(self) -> None:
        moving = self.phase.trains if self.phase.others == "eval" else tuple(self.networks)
        self.guard = Guard(self.networks[name] for name in moving)

    def fill(self, batch: Batch) -> None:
        for place, tensor in zip(_tensors(self.inputs), _tensors(batch)):
            if tensor is not None:
                place.copy_(tensor)

    def run(self) -> dict[str, Tensor]:
        """The update, and its report, which is also added to the sums."""
        report = self._refresh() if self.group is None else self._train(self.group)
        self.sums.add(report)
        return report

    def _refresh(self) -> dict[str, Tensor]:
        with torch.no_grad(), self.autocast():
            report = self.phase.loss(self.networks, self.inputs, self.context).report
        self.average()
        return _detached(report)

    def _train(self, group: Group) -> dict[str, Tensor]:
        self.guard.keep()
        losses = group.accumulate(self.phase.loss, _parts(self.inputs, self.accumulation), self.context)
        norm, finite = group.step()
        self.guard.restore(finite)
        self.average()
        group.follow(self.networks, finite)
        name = self.phase.name
        report = {**_mean_report(losses), f"{name}/gradient_norm": norm, f"{name}/skipped": 1.0 - finite}
        if group.loss_scale is not None:
            report[f"{name}/loss_scale"] = group.loss_scale.scale.clone()
            report[f"{name}/skipped"] = group.loss_scale.update(finite)
        return report


def _parts(batch: Batch, count: int) -> list[Batch]:
    """A rank's share in `count` parts whose losses' mean is its loss."""
    if count == 1:
        return [batch]
    records = len(batch.index)
    if records < count:
        raise ValueError(f"{records} records of a rank cannot be taken in {count} parts: lower engine.accumulation")
    cuts = [slice(records * k // count, records * (k + 1) // count) for k in range(count)]
    return [
        dataclasses.replace(
            batch, images=None if batch.images is None else batch.images[cut], attributes=batch.attributes[cut],
            index=batch.index[cut], draws=dataclasses.replace(batch.draws, index=batch.draws.index[cut]), size=batch.size / count,
            known=batch.known / count,
        )
        for cut in cuts
    ]


def _mean_report(losses: Sequence[Loss]) -> dict[str, Tensor]:
    reports = [_detached(loss.report) for loss in losses]
    if len(reports) == 1:
        return reports[0]
    return {name: torch.stack([report[name] for report in reports]).mean(0) for name in reports[0]}


def _detached(report: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in report.items()}
