"""How a training step would take on many ranks: counted all-reduces, a model of their time, and a check on this machine."""

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from fader.attributes import Attributes
from fader.method import Context
from pipeline.config import Experiment
from pipeline.training.throughput import Bare, Work, engine_stepper


@dataclass(frozen=True)
class Links:
    """What lies between ranks. per_node: ranks of one node. inside, between: bytes a second that a rank sends to others of its
    node, and to other nodes. latency: seconds from one rank to the next."""

    per_node: int
    inside: float
    between: float
    latency: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes: inside the nodes, and of each rank's part between them.

            2 (i - 1) / i · size / inside + 2 (m - 1) / m · size / i / between + 2 (⌈log₂ i⌉ + ⌈log₂ m⌉) · latency

        i is the number of ranks of a node and m that of nodes.
        Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.5.
        """
        i = min(ranks, self.per_node)
        m = -(-ranks // self.per_node)
        hops = (i - 1).bit_length() + (m - 1).bit_length()
        sent = (i - 1) / i / self.inside + (m - 1) / m / i / self.between
        return 2 * size * sent + 2 * hops * self.latency


@dataclass(frozen=True)
class Traffic:
    """What the ranks sum in a step, in bytes. networks: weights. gradients: each update's. sums: of layers and losses."""

    networks: dict[str, int]
    gradients: tuple[int, ...]
    sums: tuple[int, ...]

    def seconds(self, all_reduce: Callable[[float], float]) -> tuple[float, float]:
        """Of gradients, and of sums, one after the other."""
        return sum(map(all_reduce, self.gradients)), sum(map(all_reduce, self.sums))


class _Counted(torch.autograd.Function):
    """A sum over ranks that is none, and is noted, forward and back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # a function of its own: R1 goes back through it, too
        return _Counted.apply(gradient, ctx.sizes), None


def counting_loop(experiment: Experiment, attributes: Attributes, batch_size: int) -> tuple[Bare, Traffic]:
    """A bare loop that computes what a rank of several computes, and what a step of it would sum."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Work(experiment, attributes, batch_size, device)
    bare, sizes = Bare(work, experiment.precision), []
    bare.context = Context(bare.context.weights, lambda tensor: _Counted.apply(tensor, sizes))
    bare.context.connect(bare.networks)
    bare(0)
    counts = {name: 4 * sum(p.numel() for p in network.parameters()) for name, network in bare.networks.items()}
    gradients = tuple(sum(counts[name] for name in phase.trains) for phase, _ in work.turns(0) if phase.trains)
    return bare, Traffic(counts, gradients, tuple(sizes))


def seconds_a_step(step: Callable[[int], None], steps: int) -> float:
    """The median of so many steps, after some that are not counted."""
    times = []
    for number in range(steps + 3):
        began = time.perf_counter()
        step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def check(experiment: Experiment, attributes: Attributes, batch_size: int, ranks: int, steps: int) -> dict[str, float]:
    """Train on so many processes of this machine's CPU. Return seconds a step: computing alone, predicted and measured.
    The processes share cores, so computing is timed in all of them at once, without sums. What an all-reduce of 1 KiB and
    one of all gradients take is timed between them, too. So the check holds the counting and the adding up, and says
    nothing of other links, of sums that hide behind computing, or of many nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = processes.get_context("spawn").SimpleQueue()
    processes.spawn(_rank, (ranks, port, experiment, attributes, batch_size, steps, answers), nprocs=ranks)
    return answers.get()


def _rank(
    rank: int, ranks: int, port: int, experiment: Experiment, attributes: Attributes, batch_size: int, steps: int, answers: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    bare, traffic = counting_loop(experiment, attributes, batch_size)
    work = Work(experiment, attributes, batch_size, torch.device("cpu"))
    step = engine_stepper(work, experiment, "eager")
    dist.barrier()
    computing = seconds_a_step(bare, steps)
    dist.barrier()
    measured = seconds_a_step(step, steps)
    small, large = (
        seconds_a_step(lambda _, one=torch.zeros(size // 4): dist.all_reduce(one), 20) for size in (1024, max(traffic.gradients))
    )
    a_byte = max(large - small, 0.0) / max(traffic.gradients)
    predicted = computing + sum(traffic.seconds(lambda size: small + a_byte * size))
    if rank == 0:
        answers.put({"computing": computing, "predicted": predicted, "measured": measured})
    dist.barrier()
    dist.destroy_process_group()


def weak_scaling(traffic: Traffic, computing: float, links: Links, ranks: Sequence[int]) -> list[dict[str, float]]:
    """Seconds a step of each number of ranks, each with a batch of its own, when nothing that is sent hides behind computing."""
    rows = []
    for count in ranks:
        gradients, sums = traffic.seconds(lambda size: links.all_reduce(size, count))
        seconds = computing + gradients + sums
        rows.append({"ranks": count, "gradients": gradients, "sums": sums, "seconds": seconds, "of_one": computing / seconds})
    return rows
