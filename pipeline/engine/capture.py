"""Holds prepared steps in CUDA graphs, so that an update costs the host one launch instead of hundreds.

A step is run as it is a few times, because optimizers make their moments and cuDNN makes its choices then. After that it is
recorded once, and every later update replays the record. Sources: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fader.method import SumsOverRanks
from pipeline.engine.step import Step

log = logging.getLogger(__name__)

Report = dict[str, Tensor]


class CudaGraphs:
    """Records in CUDA graphs that share their memory, because no two of them run at once. Tests have a stand-in for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self) -> None:
        """Make ready for recordings; those made before are gone."""
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], Report]) -> Report:
        """Run a step as it is, where a recording may follow, which needs a stream of its own."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            report = step()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return report

    def record(self, step: Callable[[], Report]) -> tuple[Callable[[], Any], Report]:
        """Return what replays a step, and the report that every replay writes. The step itself is not run.
        Raises RuntimeError: the step does what a recording cannot hold."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local, because the loader's threads allocate memory meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                report = step()
        except RuntimeError:
            # A generator that was in a recording that failed believes to be in it for ever.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, report


class CapturedSteps:
    """Runs steps, each as it is for `WARM` updates and from its recording after them.
    A phase that cannot be recorded says why, once, and goes on as it is."""

    WARM = 3

    def __init__(self, recorder: CudaGraphs) -> None:
        self.recorder = recorder
        self.refused: set[str] = set()  # names of phases
        self.forget()

    def forget(self) -> None:
        """Record all steps anew, because what they use lies elsewhere now."""
        self.runs: dict[Step, int] = {}
        self.recordings: dict[Step, tuple[Callable[[], Any], Report]] = {}
        self.recorder.begin()

    def run(self, step: Step) -> Report:
        """Make one update. The report's tensors are valid until the step's next one."""
        if step not in self.recordings:
            self.runs[step] = self.runs.get(step, 0) + 1
            if self.runs[step] <= self.WARM or step.phase.name in self.refused:
                return self.recorder.run(step.run)
            try:
                self.recordings[step] = self.recorder.record(step.run)
            except RuntimeError as error:
                self.refused.add(step.phase.name)
                log.warning("phase %s cannot be captured, so it runs as it is: %s", step.phase.name, error)
                return self.recorder.run(step.run)
        replay, report = self.recordings[step]
        replay()
        return report

    def holds(self, step: Step) -> bool:
        """Whether the step's next update is a replay, which needs no modes and no gradients switched on."""
        return step in self.recordings


def captured_steps(wanted: str, backend: str, device: torch.device, is_main: bool) -> CapturedSteps | None:
    """What runs steps from CUDA graphs, where `engine.step` and the machine let it.
    wanted: "auto", "eager" or "captured". backend: "single", "ddp" or "deepspeed"."""
    cuda = device.type == "cuda"
    if wanted == "captured" and (backend == "deepspeed" or not cuda) and is_main:
        why = "DeepSpeed steps its own way" if backend == "deepspeed" else "there is no CUDA here"
        log.warning("engine.step: captured is left out, because %s: steps run as they are", why)
    if not cuda or backend == "deepspeed" or wanted == "eager" or (wanted == "auto" and backend != "single"):
        return None
    torch.backends.cudnn.benchmark = True  # shapes do not change, so the fastest kernels are looked for once
    return CapturedSteps(CudaGraphs(device))


def compile_networks(networks: nn.ModuleDict, twice: Sequence[str], world_size: int, is_main: bool) -> set[str]:
    """Let torch.compile make fewer kernels of the networks that it can take. It compiles each at its first use.
    Networks that are differentiated twice stay as they are, because torch.compile knows first derivatives only; and so do those
    that sum over several ranks, because each sum would break the compiled code in two.
    Returns: The names of the networks that will be compiled."""
    left = dict.fromkeys(twice, "it is differentiated twice")
    for name, network in networks.items() if world_size > 1 else ():
        if any(isinstance(module, SumsOverRanks) for module in network.modules()):
            left[name] = "it sums over ranks"
    taken = {name for name, network in networks.items() if name not in left and any(True for _ in network.parameters())}
    for network in (networks[name] for name in taken):
        network.forward = torch.compile(network.forward, dynamic=False)  # Module.compile passes torch's own modules by
    if left and is_main:
        reasons = "; ".join(f"{name} ({why})" for name, why in left.items())
        log.warning("engine.compile: networks leaves these as they are: %s", reasons)
    return taken
