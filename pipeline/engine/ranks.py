"""The processes of a launch, and the sums, means and agreements that they make together."""

import dataclasses
import datetime
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, patch_environment
from torch import Tensor

from fader.method import Batch, ReduceSum, identity
from pipeline.engine.launcher import PRECISION, meeting, refuse_leftovers, refuse_other_ways

log = logging.getLogger(__name__)


class AllReduceSum(torch.autograd.Function):
    """Sum over all ranks. Its gradient is the sum of all ranks' gradients, so it differentiates any number of times."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AllReduceSum.apply(gradient)


class Ranks:
    """The processes of a launch: which of them this one is, where it computes, and what all of them know together.
    precision: of autocast, for those that train. cpu: compute on the CPU where there is a GPU, too."""

    def __init__(self, precision: str = "fp32", cpu: bool = False) -> None:
        self._start_accelerate(precision, cpu)
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.is_local_main = self.accelerator.is_local_main_process
        self.reduce_sum: ReduceSum = AllReduceSum.apply if self.world_size > 1 else identity
        self.node = _node()
        if self.is_main and restarts_may_hang(os.environ):
            log.warning(
                "the launcher may start processes again, and they would look for each other in the store of those that are "
                "gone, and may hang: launch with --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
            )

    def _start_accelerate(self, precision: str, cpu: bool) -> None:
        """Make the process group and find the device. Accelerate is not told of DeepSpeed: it would ask for transformers."""
        refuse_other_ways()
        refuse_leftovers()
        AcceleratorState._reset_state()  # engines may follow each other in one process; the process group stays
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"), meeting():
            self.accelerator = Accelerator(
                cpu=cpu or not torch.cuda.is_available(),
                mixed_precision=PRECISION[precision],
                kwargs_handlers=[
                    DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30)),
                ],
            )

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over ranks of named scalars; it waits for the device once."""
        if not values:
            return {}
        stacked = torch.stack([torch.as_tensor(v, device=self.device).double().reshape(()) for v in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world_size).tolist()))

    def largest(self, value: float) -> float:
        """Return the largest over ranks, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.item()

    def on_node(self, value: Any) -> list[Any]:
        """Return what every rank of this machine gave, in the order of ranks; all ranks of the run call it together.
        Ranks are on one machine when their processes see each other; a rank in a container of its own is alone."""
        if self.world_size == 1:
            return [value]
        place = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino)
        given: list[Any] = [None] * self.world_size
        dist.all_gather_object(given, (place, value))
        return [theirs for where, theirs in given if where == place]

    def union(self, words: Iterable[str]) -> list[str]:
        """Return all words that any rank gave, sorted; all ranks call it together."""
        given: list[list[str]] = [sorted(set(words))] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(given, given[self.rank])
        return sorted({word for part in given for word in part})

    def count_known(self, batch: Batch) -> Batch:
        """Return the batch with `known` counted over the records that all ranks have.
        Each rank counted it by the plan, which is wrong where another rank put one record in the place of another."""
        known = (batch.attributes >= 0).sum(0).to(batch.known.dtype)
        return dataclasses.replace(batch, known=self.reduce_sum(known) / self.world_size)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def open_ranks(device: str) -> Ranks:
    """The processes of this launch, on the device asked for: auto, cpu, cuda or cuda:N.
    Raises ValueError: there is no such device; one GPU for several ranks."""
    if device not in ("auto", "cpu", "cuda") and not device.startswith("cuda:"):
        raise ValueError(f"device {device!r} is none of auto, cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch sees no GPU here; take --device cpu")
    ranks = Ranks(cpu=device == "cpu")
    if device.startswith("cuda:") and ranks.world_size > 1:
        raise ValueError(f"device {device}: {ranks.world_size} ranks take a GPU each; say --device cuda")
    return ranks


def leave() -> None:
    """Leave the process group, if there is one; after it this process cannot reach other ranks.
    A process that exits without leaving may abort in the group's threads, which a launcher takes for a crash."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _node() -> str | None:
    """Return this machine's name by Slurm or else its own; None for a run on one machine."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:  # the launcher counts machines there
        return None
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def restarts_may_hang(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher that restarts shares one store between its rounds, which torch 2.13 does by default."""
    restarts, ranks = (int(environment.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "WORLD_SIZE"))
    return restarts > 0 and ranks > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
