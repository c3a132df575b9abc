"""How fast a training step is: the engine's eager, captured, padded and compiled, beside bare loops over the same losses.

A bare loop has the method's networks, losses, backward, clipping and fused Adam, on batches that lie on the device; no guard,
no report, no moving average. All take turns, round after round, so that what else the machine does meets all of them.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fader.attributes import Attributes
from fader.method import Batch, Clock, Context, Method, Phase
from pipeline.config import Experiment, build_method
from pipeline.engine import Engine

ENGINE: dict[str, dict[str, Any]] = {
    "eager": {"step": "eager"}, "captured": {"step": "captured"}, "padded": {"step": "auto", "channel_multiple": 8},
    "compiled": {"step": "auto", "compile": "networks"},
}
BARE = {"bare": "fp32", "bare bf16": "bf16", "bare captured": "bf16"}
WAYS = (*ENGINE, *BARE)
Step = Callable[[int], None]  # makes step number k

_BATCHES = 4  # different ones, so that no step sees the batch of the last
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Speed:
    """What was measured of one way.
    images_per_second: of each round. kernels: launched a step, on a GPU; operators on the CPU. device_share: of a step's time
    in which the GPU computes. flops, bytes: of a step, as counted in an eager one; bytes are those that every operator reads
    and writes. peak_bytes: memory on the GPU, beside what was there. first_step: seconds, with compiling."""

    images_per_second: list[float] = field(default_factory=list)
    kernels: int = 0
    device_share: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    peak_bytes: int | None = None
    first_step: float = 0.0


class Work:
    """A method's first stage, step after step, on batches that lie on the device."""

    def __init__(self, experiment: Experiment, attributes: Attributes, batch_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.method: Method = build_method(experiment, attributes)
        self.device, self.batch_size = device, batch_size
        self.phases = self.method.stages()[0].phases
        size, channels = self.method.image_size, self.method.channels
        images = torch.rand(batch_size, channels, size, size) * 2 - 1
        images = images.to(device, memory_format=torch.channels_last)
        labels = torch.stack([torch.randint(attribute.k, (batch_size,)) for attribute in self.method.attributes], 1)
        self.batches = {
            (phase.stream, k): self._as_read(phase, Batch.alone(images, labels.float().to(device), stream=phase.stream, draw=k))
            for phase in self.phases
            for k in range(_BATCHES)
        }

    @staticmethod
    def _as_read(phase: Phase, batch: Batch) -> Batch:
        if phase.source == "images":
            return batch
        labels = batch.attributes if phase.source == "labels" else batch.attributes[:, :0]
        return dataclasses.replace(batch, images=None, attributes=labels, known=batch.known[: labels.shape[1]])

    def turns(self, number: int) -> Iterator[tuple[Phase, Batch]]:
        for phase in self.phases:
            for turn in range(phase.repeat if number % phase.every == 0 else 0):
                yield phase, self.batches[phase.stream, (number + turn) % _BATCHES]


def engine_stepper(work: Work, experiment: Experiment, way: str) -> Step:
    """Steps of the engine, as a run makes them but for loader, meter and validation."""
    settings = experiment.engine.model_copy(update={"compile": "none", "channel_multiple": 1, **ENGINE[way]})
    engine = Engine(work.method, precision=experiment.precision, settings=settings)

    def make(number: int) -> None:
        clock = Clock(number * work.batch_size, number * work.batch_size, number)
        for phase, batch in work.turns(number):
            engine.update(phase, batch, clock)

    return make


class Bare:
    """The same updates in a loop that somebody would write by hand."""

    def __init__(self, work: Work, precision: str) -> None:
        self.work, self.precision = work, precision
        self.networks = nn.ModuleDict(work.method.networks).to(work.device).requires_grad_(False)
        self.context = Context(work.method.weights(0, work.device))
        self.groups = {}
        for trains, settings in work.method.optimizers().items():
            parameters = [p for name in trains for p in self.networks[name].parameters()]
            options: dict[str, Any] = {"fused": True, "capturable": work.device.type == "cuda"}
            adam = torch.optim.Adam(parameters, settings.learning_rate, settings.betas, **options)
            self.groups[trains] = (parameters, adam, settings.clip_norm)

    def __call__(self, number: int) -> None:
        for phase, batch in self.work.turns(number):
            self.update(phase, batch)

    def update(self, phase: Phase, batch: Batch) -> None:
        for name, network in self.networks.items():
            training = name in phase.trains or phase.others == "train"
            if network.training != training:
                network.train(training)
        if not phase.trains:
            with torch.no_grad(), self._autocast():
                phase.loss(self.networks, batch, self.context)
            return
        parameters, adam, clip_norm = self.groups[phase.trains]
        for parameter in parameters:
            parameter.requires_grad_(True)
        with self._autocast():
            value = phase.loss(self.networks, batch, self.context).value
        adam.zero_grad(set_to_none=True)
        value.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        adam.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.work.device.type, _DTYPES[self.precision])


def captured(step: Step, work: Work) -> Step:
    """A bare loop's steps from CUDA graphs, one for each set of phases that a step may have."""
    graphs: dict[tuple[str, ...], torch.cuda.CUDAGraph] = {}
    stream = torch.cuda.Stream()

    def make(number: int) -> None:
        kind = tuple(phase.name for phase, _ in work.turns(number))
        if kind not in graphs:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step(number)
            torch.cuda.current_stream().wait_stream(stream)
            graphs[kind] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[kind], stream=stream):
                step(number)
        graphs[kind].replay()

    return make


def stepper(way: str, experiment: Experiment, attributes: Attributes, batch_size: int, device: torch.device) -> Step:
    work = Work(experiment, attributes, batch_size, device)
    if way in ENGINE:
        return engine_stepper(work, experiment, way)
    bare = Bare(work, BARE[way])
    return captured(bare, work) if way == "bare captured" else bare


class _Counter(TorchDispatchMode):
    """Counts operators, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes = 0, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):  # no view
            self.operators += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        return result


def measure(
    experiment: Experiment, attributes: Attributes, batch_size: int, ways: Sequence[str], rounds: int, seconds: float
) -> dict[str, Speed]:
    """Measure the ways in turns. Raises ValueError: a way is none of WAYS, or needs CUDA where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for way in ways:
        if way not in WAYS:
            raise ValueError(f"--ways: {way!r} is none of {', '.join(WAYS)}")
        if way in ("captured", "bare captured") and device.type != "cuda":
            raise ValueError(f"--ways: {way!r} needs CUDA, and there is none here")
    steps: dict[str, Step] = {}
    found = {way: Speed() for way in ways}
    for way in ways:
        before = _begin_memory(device)
        steps[way] = stepper(way, experiment, attributes, batch_size, device)
        began = time.perf_counter()
        steps[way](0)
        _settle(device)
        found[way].first_step = time.perf_counter() - began
        for number in range(1, 17):  # graphs are recorded and moments made by then, penalties of every few steps included
            steps[way](number)
        _settle(device)
        if before is not None:
            found[way].peak_bytes = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for way in ways:
            found[way].images_per_second.append(_rate(steps[way], batch_size, seconds, device))
    counting = stepper("bare", experiment, attributes, batch_size, device)
    counting(0)
    with FlopCounterMode(display=False) as flops, _Counter() as counter:
        counting(1)
    for way, speed in found.items():
        speed.flops, speed.bytes, speed.kernels = flops.get_total_flops(), counter.bytes, counter.operators
        if device.type == "cuda":
            speed.kernels, busy = _profiled(steps[way])
            speed.device_share = busy * statistics.median(speed.images_per_second) / batch_size
    return found


def ceilings(precision: str) -> tuple[float, float]:
    """This device's FLOP/s in a product of two large matrices, and the bytes/s that a copy reads and writes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, times = (8192, 20) if device.type == "cuda" else (1024, 5)
    a = torch.randn(size, size, device=device, dtype=_DTYPES[precision])
    data = torch.empty(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    other = torch.empty_like(data)
    product, copy = _seconds(lambda: a @ a, times, device), _seconds(lambda: other.copy_(data), times, device)
    return 2 * size**3 / product, 2 * data.numel() / copy


def _seconds(work: Callable[[], Any], times: int, device: torch.device) -> float:
    work()
    _settle(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    _settle(device)
    return (time.perf_counter() - began) / times


def _rate(step: Step, batch_size: int, seconds: float, device: torch.device) -> float:
    number, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(8):
            number += 1
            step(number)
        _settle(device)
    return number * batch_size / (time.perf_counter() - began)


def _profiled(step: Step) -> tuple[int, float]:
    """Kernels a step, and seconds a step in which the GPU computes."""
    from torch.profiler import ProfilerActivity, profile

    times = 8
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(1, times + 1):
            step(number)
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    return sum(e.count for e in events) // times, sum(e.self_device_time_total for e in events) / times / 1e6


def _begin_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
