"""Accelerate behind few verbs: update, mean, any, state, load. The only file that knows of several processes.

A phase's loss is what gets wrapped. For each trained group the engine builds one module whose forward runs a whole loss
with the raw networks inside, while only the group's parameters require gradients; the back end wraps *that*. So no
method can call a trained network around its wrapper, autocast covers everything, and a frozen discriminator costs no
communication.
"""

from __future__ import annotations

import copy
import datetime
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from fader.draws import key_of
from fader.method import Batch, Clock, Context, Loss, LossFunction, Method, Optimizer, Phase
from fader.schedules import ema_decay

_PRECISION = {"fp32": "no", "bf16": "bf16"}


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


class GroupLoss(nn.Module):
    """What a back end wraps: all networks, of which one group trains, and a forward that runs a phase's loss."""

    def __init__(self, networks: nn.ModuleDict) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, loss: LossFunction, batch: Batch, context: Context) -> Loss:
        return loss(self.networks, batch, context)


@dataclass
class State:
    """Everything of the weights and optimizers that a run must restore, by name, on the CPU.

    networks: "network/parameter or buffer". ema: the same names. optimizers: "network/parameter/moment".
    """

    networks: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizers: dict[str, Tensor]


class _Group:
    """One trained group: its wrapped loss, its optimizer, its moving average."""

    def __init__(self, trains: tuple[str, ...], settings: Optimizer, networks: nn.ModuleDict) -> None:
        self.trains = trains
        self.settings = settings
        self.names = [f"{name}/{key}" for name in trains for key, _ in networks[name].named_parameters()]
        self.parameters = [p for name in trains for p in networks[name].parameters()]
        self.optimizer = _optimizer(settings, self.parameters)
        self.wrapped: nn.Module | None = None
        self.ema: dict[str, nn.Module] = {}
        if settings.ema_half_life:
            self.ema = {name: copy.deepcopy(networks[name]).requires_grad_(False).eval() for name in trains}


class Engine:
    """Trains a method's phases on one process or many.

    Args:
        method: its networks are moved to the device and trained in place. Every rank must have built them alike.
        precision: "fp32" or "bf16" (autocast around the whole loss; weights and optimizer stay float32).
        seed: of dropout, which is keyed by (seed, stream, draw, rank).

    Raises:
        ValueError: the launcher names another precision than the experiment; a network stands in two groups.
    """

    def __init__(self, method: Method, *, precision: str = "fp32", seed: int = 0) -> None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") or "no"
        if launched not in ("no", _PRECISION[precision]):
            raise ValueError(
                f"the launcher says mixed precision {launched}, the experiment says precision: {precision}; "
                "leave it out of the launcher, the experiment owns it"
            )
        AcceleratorState._reset_state()  # engines may follow each other in one process; the process group stays
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=_PRECISION[precision],
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30)),
            ],
        )
        self.method = method
        self.seed = seed
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.networks = nn.ModuleDict(method.networks).to(self.device)
        self._reduce_sums()
        self.groups = {t: _Group(t, settings, self.networks) for t, settings in method.optimizers().items()}
        self._check_phases()
        for group in self.groups.values():
            self._require_gradients(group.trains)
            with warnings.catch_warnings():  # torch 2.11 knows only the argument that torch 2.13 calls deprecated
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                group.wrapped = self.accelerator.prepare_model(GroupLoss(self.networks))
        self._require_gradients(())

    # --- one update -------------------------------------------------------------------------------------------------

    def update(self, phase: Phase, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """One update of one phase: its networks move, nothing else does.

        A loss or gradient that is not finite changes nothing, on the device and without waiting for it.

        Returns:
            The loss's report as detached scalars, this rank's parts of means over the global batch; with
            NAME/gradient_norm and NAME/skipped (1 when the update was left out).
        """
        self._stand(phase)
        torch.manual_seed(key_of(self.seed, "dropout", batch.draws.stream, batch.draws.draw, self.rank))
        context = Context(clock, self.reduce_sum)
        if not phase.trains:
            with torch.no_grad(), self.accelerator.autocast():
                return _detached(phase.loss(self.networks, batch, context).report)
        group = self.groups[phase.trains]
        buffers = [buffer for name in self.networks for buffer in self.networks[name].buffers()]
        before = [buffer.clone() for buffer in buffers]
        group.optimizer.zero_grad(set_to_none=True)
        loss: Loss = group.wrapped(phase.loss, batch, context)
        loss.value.backward()
        norm, finite = _clip(group.parameters, group.settings.clip_norm)
        skipped = 1.0 - finite
        group.optimizer.found_inf = skipped
        group.optimizer.step()
        for buffer, old in zip(buffers, before):
            buffer.copy_(torch.where(finite > 0, buffer, old))
        self._follow(group, batch.size * self.world_size, finite)
        report = _detached(loss.report)
        report[f"{phase.name}/gradient_norm"] = norm
        report[f"{phase.name}/skipped"] = skipped
        return report

    def _stand(self, phase: Phase) -> None:
        """The phase's networks train; the others stand as it says, and hold no gradient."""
        for name, network in self.networks.items():
            network.train(name in phase.trains or name in phase.refreshes or phase.others == "train")
        self._require_gradients(phase.trains)

    def _require_gradients(self, trains: Iterable[str]) -> None:
        for name, network in self.networks.items():
            network.requires_grad_(name in trains)

    @torch.no_grad()
    def _follow(self, group: _Group, images: float, finite: Tensor) -> None:
        """The moving average goes a step towards the weights; buffers are taken as they are."""
        if not group.ema:
            return
        weight = finite * (1.0 - ema_decay(group.settings.ema_half_life, images))
        for name, average in group.ema.items():
            for old, new in zip(average.parameters(), self.networks[name].parameters()):
                old.lerp_(new, weight.to(old.dtype))
            for old, new in zip(average.buffers(), self.networks[name].buffers()):
                old.copy_(new)

    def _reduce_sums(self) -> None:
        """Layers that need sums over the global batch get them here; on one process they keep the identity."""
        if self.world_size > 1:
            for module in self.networks.modules():
                if hasattr(module, "reduce_sum"):
                    module.reduce_sum = self.reduce_sum

    def _check_phases(self) -> None:
        trained = [name for trains in self.groups for name in trains]
        twice = {name for name in trained if trained.count(name) > 1}
        if twice:
            raise ValueError(f"{self.method.name}: {', '.join(sorted(twice))} stands in two trained groups")
        for stage in self.method.stages():
            for phase in stage.phases:
                if phase.trains and phase.trains not in self.groups:
                    raise ValueError(f"{self.method.name}: phase {phase.name} trains {phase.trains}, which no optimizer does")

    # --- over all ranks ---------------------------------------------------------------------------------------------

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, differentiable; the identity on one."""
        return AllReduceSum.apply(tensor) if self.world_size > 1 else tensor

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean over ranks of named scalars; waits for the device once."""
        if not values:
            return {}
        stacked = torch.stack([torch.as_tensor(v, device=self.device).double().reshape(()) for v in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world_size).tolist()))

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def wait(self) -> None:
        """A barrier."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """A copy on the CPU that further training leaves alone."""
        networks = {f"{n}/{k}": _cpu(v) for n, m in self.networks.items() for k, v in m.state_dict().items()}
        ema, optimizers = {}, {}
        for group in self.groups.values():
            for name, average in group.ema.items():
                ema |= {f"{name}/{k}": _cpu(v) for k, v in average.state_dict().items()}
            for name, parameter in zip(group.names, group.parameters):
                for key, value in group.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        optimizers[f"{name}/{key}"] = _cpu(value)
        return State(networks, ema, optimizers)

    def load(self, state: State) -> None:
        """Restore what `state` gave, from any number of ranks.

        Raises:
            ValueError: the state is of other networks.
        """
        _load_networks(self.networks, state.networks, "checkpoint")
        for group in self.groups.values():
            if group.ema:
                _load_networks(nn.ModuleDict(group.ema), state.ema, "checkpoint's moving average")
            for name, parameter in zip(group.names, group.parameters):
                prefix = f"{name}/"
                entries = {k.removeprefix(prefix): v for k, v in state.optimizers.items() if k.startswith(prefix)}
                if entries:
                    group.optimizer.state[parameter] = {k: _like(parameter, v) for k, v in entries.items()}


def _optimizer(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused kinds only: they skip an update on the device when `found_inf` is set."""
    if settings.kind == "sgd":
        return torch.optim.SGD(
            parameters, settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.Adam(
        parameters, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay, fused=True
    )


@torch.no_grad()
def _clip(parameters: list[nn.Parameter], clip_norm: float) -> tuple[Tensor, Tensor]:
    """Scale all gradients to an L2 norm of at most `clip_norm` (0 = leave them). Returns the norm before, and 1 or 0: finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm, torch.isfinite(norm).to(torch.float32)


def _detached(report: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).detach() for name, value in report.items()}


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy on the parameter's device; a moment also in its memory format, which fused kernels take for granted."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)


def _load_networks(networks: nn.ModuleDict, state: Mapping[str, Tensor], what: str) -> None:
    for name, network in networks.items():
        prefix = f"{name}/"
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            network.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"the {what} does not fit network {name}: {' '.join(str(error).split())[:300]}") from None
