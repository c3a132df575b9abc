"""A trained group: the loss that is wrapped, its optimizer, its moving average; on one process and under DDP.

All that changes from one update to the next lies in tensors that stay where they are.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fader.method import Batch, Clock, Context, Loss, LossFunction, Optimizer
from fader.schedules import ema_decay
from pipeline.engine.state import like, on_cpu

_NOTHING = contextlib.nullcontext()


class Scalar:
    """A number on the device that the host sets, and writes only when it is another one."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.tensor = torch.zeros((), dtype=dtype, device=device)
        self._value = 0.0

    def set(self, value: float) -> None:
        if value != self._value:
            self.tensor.fill_(value)
            self._value = value


class GroupLoss(nn.Module):
    """What a back end wraps: all networks, of which one group trains, and a forward that runs a phase's loss."""

    def __init__(self, networks: nn.ModuleDict) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, loss: LossFunction, batch: Batch, context: Context) -> Loss:
        return loss(self.networks, batch, context)


class AutocastLoss(GroupLoss):
    """The same, with autocast around it, for who wraps nothing else around it."""

    def __init__(self, networks: nn.ModuleDict, autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
        super().__init__(networks)
        self.autocast = autocast

    def forward(self, loss: LossFunction, batch: Batch, context: Context) -> Any:
        with self.autocast():
            return super().forward(loss, batch, context)


class LossScale:
    """fp16's factor on one group's loss: halved when a gradient overflows, doubled after 2,000 updates without that.
    It lives on the device, and the host never waits for it.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2."""

    INTERVAL = 2000

    def __init__(self, device: torch.device, scale: float = 65536.0) -> None:
        self.scale = torch.tensor(scale, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> Tensor:
        """Follow an update that was finite (1) or not (0). Return 1 where it was not although nothing was scaled."""
        fault = (1.0 - finite) * (self.scale <= 1.0)
        good = (self.good + 1.0) * finite
        grown = torch.where(good >= self.INTERVAL, self.scale * 2.0, self.scale)
        self.scale.copy_(torch.where(finite > 0, grown, self.scale * 0.5).clamp(1.0, 2.0**24))
        self.good.copy_(torch.where(good >= self.INTERVAL, 0.0, good))
        return fault


class Group:
    """One trained group: its wrapped loss, its optimizer, its moving average. This one serves one process and DDP."""

    def __init__(self, trains: tuple[str, ...], settings: Optimizer, networks: nn.ModuleDict) -> None:
        self.trains = trains
        self.settings = settings
        self.names = [f"{name}/{key}" for name in trains for key, _ in networks[name].named_parameters()]
        self.parameters = [p for name in trains for p in networks[name].parameters()]
        device = self.parameters[0].device
        # The fused kernels read a learning rate as float32 on CUDA and as float64 on the CPU.
        self.rate = Scalar(device, torch.float32 if device.type == "cuda" else torch.float64)
        self.ema_weight = Scalar(device)
        self.optimizer = optimizer_of(settings, self.parameters, self.rate.tensor)
        self._begin_momentum()
        self.wrapped: Any = None
        self.loss_scale: LossScale | None = None
        self.ema: dict[str, nn.Module] = {}
        if settings.ema_half_life:
            self.ema = {name: copy.deepcopy(networks[name]).requires_grad_(False).eval() for name in trains}

    def set_rates(self, factor: float, clock: Clock, images: int) -> None:
        """Set the learning rate and the moving average's weight for an update by a global batch of so many images."""
        self.rate.set(self.settings.rate(clock.stage_images) * factor)
        if self.ema:
            self.ema_weight.set(1.0 - ema_decay(self.settings.ema_half_life, images))

    def accumulate(self, function: LossFunction, parts: Sequence[Batch], context: Context) -> list[Loss]:
        """Compute the gradient of the parts' mean loss, averaged over ranks, and leave it where `step` looks for it."""
        self.optimizer.zero_grad(set_to_none=True)  # backward makes them anew, in a capture in the graph's own memory
        losses = []
        for number, part in enumerate(parts, 1):
            with self.wrapped.no_sync() if number < len(parts) and hasattr(self.wrapped, "no_sync") else _NOTHING:
                loss: Loss = self.wrapped(function, part, context)
                value = loss.value if len(parts) == 1 else loss.value / len(parts)
                (value if self.loss_scale is None else value * self.loss_scale.scale).backward()
            losses.append(loss)
        return losses

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip the gradients, and move the weights unless a gradient is not finite.
        Returns: The gradients' norm before clipping; and 1 for an update that was finite, 0 for one that was left out."""
        self._unscale()
        norm, finite = clip(self.parameters, self.settings.clip_norm)
        self.optimizer.found_inf = 1.0 - finite
        with torch.no_grad():
            inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        return norm, finite

    def _unscale(self) -> None:
        if self.loss_scale is not None:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1.0 / self.loss_scale.scale)

    @torch.no_grad()
    def follow(self, networks: nn.ModuleDict, finite: Tensor) -> None:
        """Move the average a step towards the weights, and its running statistics towards theirs.
        The newest statistics would not fit the averaged weights: together they reconstructed CelebA at 250,000 images with an MSE
        of 0.186, the raw weights with 0.061."""
        if not self.ema:
            return
        averages, news = (
            [t for name in self.trains for t in (*modules[name].parameters(), *modules[name].buffers())]
            for modules in (self.ema, networks)
        )
        pairs = list(zip(averages, news))
        for old, new in pairs:
            if not old.is_floating_point():  # a count
                old.copy_(new)
        olds, news = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        weight = finite * self.ema_weight.tensor
        if weight.is_cuda:  # three kernels
            steps = torch._foreach_sub(news, olds)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(olds, steps)
            return
        for old, new in zip(olds, news):  # one pass through memory
            old.lerp_(new, weight.to(old.dtype))

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors by name, whole, on the CPU."""
        return {
            f"{name}/{key}": on_cpu(value)
            for name, parameter in zip(self.names, self.parameters)
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `moments` gave, by parameter; the weights have been loaded before."""
        for name, parameter in zip(self.names, self.parameters):
            self.optimizer.state.pop(parameter, None)
            if moments[name]:
                self.optimizer.state[parameter] = {k: like(parameter, v) for k, v in moments[name].items()}
        self._begin_momentum()

    def _begin_momentum(self) -> None:
        """Fused SGD makes its buffers in its first update, and leaves them as memory was when that one is left out."""
        for parameter in self.parameters if self.settings.momentum else ():
            self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


class FlatGroup(Group):
    """A group on several ranks whose gradients one all-reduce sums after backward, as a CUDA graph can hold it.
    compressed: they travel as bf16."""

    compressed = False

    def accumulate(self, function: LossFunction, parts: Sequence[Batch], context: Context) -> list[Loss]:
        losses = super().accumulate(function, parts, context)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]).div_(dist.get_world_size())
        travelling = flat.to(torch.bfloat16) if self.compressed else flat
        dist.all_reduce(travelling)
        means = travelling.to(flat.dtype).split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [mean.view(g.shape) for mean, g in zip(means, gradients)])
        return losses


def _leave_compiler_out() -> None:
    """Keep torch's optimizers from importing its compiler, which takes 2 of the 8 seconds of a start on a CPU.
    They import it only to tell it, at each function's first call, that it is to leave that alone; no optimizer is compiled here.
    Torch marks a function that has told it by an attribute; `step` is called without what it is wrapped in."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        setattr(function, "__dynamo_disable", function)


def optimizer_of(settings: Optimizer, parameters: list[nn.Parameter], rate: Tensor) -> torch.optim.Optimizer:
    """Make a fused optimizer, because these read the learning rate and skip an update (`found_inf`) on the device."""
    _leave_compiler_out()
    options = {"lr": rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **options)
    adam = torch.optim.Adam(parameters, betas=settings.betas, capturable=rate.is_cuda, decoupled_weight_decay=True, **options)
    adam._warned_capturable_if_run_uncaptured = True  # it would warn of steps that no capture holds, which are meant
    return adam


@torch.no_grad()
def clip(parameters: list[nn.Parameter], clip_norm: float) -> tuple[Tensor, Tensor]:
    """Scale all gradients to an L2 norm of at most `clip_norm` (0 = leave them). Return the norm before; 1 if finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm, torch.isfinite(norm).to(torch.float32)


def reduce_in_bf16(state, bucket):
    """Reduce DDP's gradients in bf16 on any back end; torch's own hook takes NCCL only."""
    small = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    reduced = dist.all_reduce(small, async_op=True).get_future()
    return reduced.then(lambda future: bucket.buffer().copy_(future.value()[0]))
