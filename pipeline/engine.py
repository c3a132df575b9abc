"""Accelerate and DeepSpeed behind few verbs: update, mean, largest, state, load. Only this file knows of several processes.

A phase's loss is what gets wrapped. For each trained group the engine builds one module whose forward runs a whole loss
with the raw networks inside, while only the group's parameters require gradients; the back end wraps *that*. So no
method can call a trained network around its wrapper, autocast covers everything, and a frozen discriminator costs no
communication. Back ends: one process, DDP, and DeepSpeed ZeRO-0, 1, 2 (one DeepSpeed engine a trained group).

Accelerate makes the process group and names device and rank on every back end. DeepSpeed is asked for in the experiment
or by Accelerate's launcher (`--use_deepspeed`, `distributed_type: DEEPSPEED`); the engine reads what that launcher left
in the environment and starts DeepSpeed itself, because Accelerate's own way takes one model and needs transformers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from fader.draws import key_of
from fader.method import Batch, Clock, Context, Loss, LossFunction, Method, Optimizer, Phase
from fader.schedules import ema_decay, ramp
from pipeline.config import WHY_NOT_ZERO_3, EngineConfig

log = logging.getLogger(__name__)

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_LR_POWER = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


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


class _Unfolded(GroupLoss):
    """The same for DeepSpeed, which finds tensors in tuples but not in dataclasses, and turns an outer autocast off."""

    def __init__(self, networks: nn.ModuleDict, autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
        super().__init__(networks)
        self.autocast = autocast

    def forward(self, loss: LossFunction, batch: Batch, context: Context) -> tuple[Tensor, Mapping[str, Any]]:
        with self.autocast():
            found = loss(self.networks, batch, context)
        return found.value, found.report


@dataclass
class State:
    """Everything of the weights and optimizers that a run must restore, by name, on the CPU.

    networks: "network/parameter or buffer". ema: the same names. optimizers: "network/parameter/moment", the step count
    among them, whole whatever back end and number of ranks held them; and "group/loss_scale" under fp16.
    """

    networks: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizers: dict[str, Tensor]


class LossScale:
    """fp16's factor on one group's loss: halved when a gradient overflows, doubled after 2,000 updates without that.

    It lives on the device and is never waited for.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    INTERVAL = 2000

    def __init__(self, device: torch.device, scale: float = 65536.0) -> None:
        self.scale = torch.tensor(scale, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> Tensor:
        """Take note of an update. finite: 1 or 0. Returns 1 where it overflowed although nothing was scaled."""
        fault = (1.0 - finite) * (self.scale <= 1.0)
        good = (self.good + 1.0) * finite
        grown = torch.where(good >= self.INTERVAL, self.scale * 2.0, self.scale)
        self.scale = torch.where(finite > 0, grown, self.scale * 0.5).clamp(1.0, 2.0**24)
        self.good = torch.where(good >= self.INTERVAL, 0.0, good)
        return fault


class _Group:
    """One trained group: its wrapped loss, its optimizer, its moving average. This one serves one process and DDP."""

    def __init__(self, trains: tuple[str, ...], settings: Optimizer, networks: nn.ModuleDict) -> None:
        self.trains = trains
        self.settings = settings
        self.names = [f"{name}/{key}" for name in trains for key, _ in networks[name].named_parameters()]
        self.parameters = [p for name in trains for p in networks[name].parameters()]
        self.optimizer = _optimizer(settings, self.parameters)
        self.wrapped: Any = None
        self.loss_scale: LossScale | None = None
        self.ema: dict[str, nn.Module] = {}
        if settings.ema_half_life:
            self.ema = {name: copy.deepcopy(networks[name]).requires_grad_(False).eval() for name in trains}

    def set_rate(self, factor: float, clock: Clock) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(clock.stage_images) * factor

    def accumulate(self, function: LossFunction, parts: Sequence[Batch], context: Context) -> list[Loss]:
        """Leave the gradient of the parts' mean loss, averaged over ranks, where `step` looks for it."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, part in enumerate(parts, 1):
            with self.wrapped.no_sync() if number < len(parts) and hasattr(self.wrapped, "no_sync") else _NOTHING:
                loss: Loss = self.wrapped(function, part, context)
                value = loss.value if len(parts) == 1 else loss.value / len(parts)
                (value if self.loss_scale is None else value * self.loss_scale.scale).backward()
            losses.append(loss)
        return losses

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip, and move unless a gradient is not finite. Returns the norm before clipping, and 1 or 0: finite."""
        self._unscale()
        norm, finite = _clip(self.parameters, self.settings.clip_norm)
        self.optimizer.found_inf = 1.0 - finite
        self.optimizer.step()
        return norm, finite

    def _unscale(self) -> None:
        if self.loss_scale is not None:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1.0 / self.loss_scale.scale)

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors by name, whole, on the CPU."""
        found = {}
        for name, parameter in zip(self.names, self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}/{key}"] = _cpu(value)
        return found

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `moments` gave, by parameter; the weights have been loaded before."""
        for name, parameter in zip(self.names, self.parameters):
            self.optimizer.state.pop(parameter, None)
            if moments[name]:
                self.optimizer.state[parameter] = {k: _like(parameter, v) for k, v in moments[name].items()}


class _DeepSpeedGroup(_Group):
    """One trained group behind a DeepSpeed engine of its own.

    At stages 1 and 2 each rank holds an equal slice of one flat vector: the group's float32 parameters in order, padded
    at the end. Its moments are slices of the same cut, so they are gathered and cut by position.
    """

    stage = 0

    def wrap(self, deepspeed: Any, loss: _Unfolded, settings: dict[str, Any]) -> None:
        self.stage = settings["zero_optimization"]["stage"]
        self.wrapped, *_ = deepspeed.initialize(
            model=loss,
            optimizer=self.optimizer,
            model_parameters=self.parameters,
            config=settings,
            dist_init_required=False,
        )
        if self.stage:
            with torch.no_grad():
                held, expected = self._slice, self._cut([p.detach() for p in self.parameters])
            if not torch.equal(held.detach(), expected):
                raise RuntimeError("this version of DeepSpeed cuts its weights in a way that checkpoints do not know")

    def accumulate(self, function: LossFunction, parts: Sequence[Batch], context: Context) -> list[Loss]:
        losses = []
        if self.stage and self.loss_scale is not None:
            self.wrapped.optimizer.override_loss_scale(float(self.loss_scale.scale))
        for number, part in enumerate(parts, 1):
            value, report = self.wrapped(function, part, context)
            scaled = value if self.stage or self.loss_scale is None else value * self.loss_scale.scale
            self.wrapped.backward(scaled)  # it divides by the number of parts itself
            if number < len(parts):
                self.wrapped.step()  # counts the part; DeepSpeed moves nothing before the last
            losses.append(Loss(value, report))
        return losses

    def step(self) -> tuple[Tensor, Tensor]:
        if not self.stage:
            self._unscale()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            finite = torch.isfinite(norm).to(torch.float32)
            self.optimizer.found_inf = 1.0 - finite
            self.wrapped.step()
            return norm, finite
        self.wrapped.step()  # on every rank it leaves out an update whose norm over all ranks is not finite
        device = self.parameters[0].device
        norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), dtype=torch.float32, device=device).reshape(())
        return norm, torch.tensor(float(not self.wrapped.optimizer.overflow), device=device)

    @property
    def _slice(self) -> Tensor:
        """This rank's float32 part of the flat vector: what the optimizer really moves."""
        (held,) = self.wrapped.optimizer.single_partition_of_fp32_groups
        return held

    def _cut(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's slice of the flat vector of one tensor a parameter."""
        held = self._slice
        flat = held.new_zeros(held.numel() * dist.get_world_size())
        torch.cat([t.reshape(-1).to(flat) for t in tensors], out=flat[: sum(t.numel() for t in tensors)])
        return flat.view(-1, held.numel())[dist.get_rank()].clone()

    def moments(self) -> dict[str, Tensor]:
        if not self.stage:
            return super().moments()
        held, found = self._slice, {}
        for key, value in sorted(self.optimizer.state.get(held, {}).items()):  # every rank gathers in the same order
            if not isinstance(value, Tensor):
                continue
            if value.shape != held.shape:  # the step count, one for all
                found |= {f"{name}/{key}": _cpu(value) for name in self.names}
                continue
            slices = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(slices, value.contiguous())
            sizes = [p.numel() for p in self.parameters]
            whole = torch.cat(slices)[: sum(sizes)].split(sizes)
            found |= {f"{n}/{key}": _cpu(v.view(p.shape)) for n, p, v in zip(self.names, self.parameters, whole)}
        return found

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        if not self.stage:
            return super().load_moments(moments)
        self.wrapped.optimizer.refresh_fp32_params()
        held = self._slice
        self.optimizer.state.pop(held, None)
        keys = sorted({key for entries in moments.values() for key in entries})
        if not keys:
            return
        entries: dict[str, Tensor] = {}
        for key in keys:
            values = [moments[name].get(key) for name in self.names]
            known = next(value for value in values if value is not None)
            if all(v is None or v.shape == p.shape for v, p in zip(values, self.parameters)) and key != "step":
                known_or_zero = [torch.zeros_like(p) if v is None else v for v, p in zip(values, self.parameters)]
                entries[key] = self._cut(known_or_zero)
            else:
                entries[key] = known.to(held.device, copy=True)
        self.optimizer.state[held] = entries


@dataclass(frozen=True)
class _Launcher:
    """What Accelerate's launcher left in the environment. deepspeed: its settings, None when it was not asked for."""

    precision: str
    deepspeed: dict[str, Any] | None

    @staticmethod
    def read() -> _Launcher:
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") or "no"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
            return _Launcher(precision, None)
        file = _launched("CONFIG_FILE")
        if file:
            try:
                return _Launcher(precision, json.loads(Path(file).read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise ValueError(f"the launcher's DeepSpeed file {file} is not readable as JSON: {error}") from None
        tree: dict[str, Any] = {"zero_optimization": {"stage": int(_launched("ZERO_STAGE") or 2)}}  # as Accelerate
        for device in ("optimizer", "param"):
            place = _launched(f"OFFLOAD_{device.upper()}_DEVICE")
            if place:
                tree["zero_optimization"][f"offload_{device}"] = {"device": place}
        for name in ("GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
            value = os.environ.get(f"ACCELERATE_{name}", "auto").lower()
            if value not in ("", "none", "auto"):
                tree[name.lower()] = float(value)
        return _Launcher(precision, tree)

    def check_precision(self, precision: str) -> None:
        """Raises ValueError when the launcher, or its DeepSpeed file, names another precision than the experiment."""
        named = {"the launcher says mixed precision": self.precision}
        for kind in ("bf16", "fp16"):
            if (self.deepspeed or {}).get(kind, {}).get("enabled") is True:
                named["the launcher's DeepSpeed file enables"] = kind
        for who, what in named.items():
            if what not in ("no", _PRECISION[precision]):
                raise ValueError(
                    f"{who} {what}, the experiment says precision: {precision}; leave it out of the launcher, "
                    "the experiment owns it"
                )


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable has another value while this lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _launched(name: str) -> str:
    value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "")
    return "" if value.lower() in ("none", "auto") else value


_OWNED = {  # keys of a DeepSpeed file that say what the experiment says already
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "optimizer": "the method's optimizers",
    "scheduler": "engine.lr_scaling and engine.warmup_images",
    "communication_data_type": "engine.gradient_compression",
    "torch_autocast": "precision",
}
_LEFT_OUT = ("bf16", "fp16", "amp", "gradient_accumulation_steps", "gradient_clipping", *_OWNED)
_REFUSED = ("offload_optimizer", "offload_param", "round_robin_gradients", "parameter_alignment")


def _deepspeed_settings(
    launched: Mapping[str, Any], settings: EngineConfig, clip_norms: Iterable[float]
) -> dict[str, Any]:
    """DeepSpeed's settings but for what differs between groups.

    Raises:
        ValueError: the launcher says something that the experiment says otherwise, or that cannot be.
    """
    zero = {key: value for key, value in launched.get("zero_optimization", {}).items() if value != "auto"}
    stage = zero.pop("stage", None)
    if stage is not None and settings.zero_stage not in (None, stage):
        raise ValueError(
            f"the launcher says ZeRO stage {stage}, the experiment says engine.zero_stage: {settings.zero_stage}; "
            "leave one of them out"
        )
    stage = settings.zero_stage if stage is None else stage
    stage = 1 if stage is None else stage
    if stage not in (0, 1, 2):
        raise ValueError(WHY_NOT_ZERO_3 if stage == 3 else f"ZeRO stage {stage} is none of 0, 1, 2")
    for key in _REFUSED:
        value = zero.pop(key, None)
        if value and not (isinstance(value, Mapping) and value.get("device", "none") == "none"):
            raise ValueError(f"the launcher's DeepSpeed settings ask for {key}, which has no place here: leave it out")
    for key, owner in _OWNED.items():
        if launched.get(key, "auto") != "auto":
            raise ValueError(f"the launcher's DeepSpeed names {key}; the experiment owns it ({owner}); say auto")
    steps, clip = launched.get("gradient_accumulation_steps", "auto"), launched.get("gradient_clipping", "auto")
    if steps not in ("auto", settings.accumulation):
        raise ValueError(
            f"the launcher says gradient_accumulation_steps {steps:g}, the experiment says engine.accumulation: "
            f"{settings.accumulation}; leave it out of the launcher, the experiment owns it"
        )
    other = [norm for norm in clip_norms if clip not in ("auto", norm)]
    if other:
        raise ValueError(
            f"the launcher says gradient_clipping {clip:g}, the method clips at {other[0]:g}; say auto in the launcher"
        )
    return {
        "steps_per_print": 10**9,
        **{key: value for key, value in launched.items() if key not in (*_LEFT_OUT, "zero_optimization")},
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own throughput figures read it
        "gradient_accumulation_steps": settings.accumulation,
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_optimization": {**zero, "stage": stage},
        **({"communication_data_type": "bf16"} if settings.gradient_compression == "bf16" else {}),
    }


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Who imports this module meanwhile is told that there is none, unless it is there already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _hidden("mlflow"):  # DeepSpeed's autotuner would import it on every rank: 1.8 of its 2.2 seconds
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # otherwise it compiles, at the first start on a machine, an operator for inference only
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


class Ranks:
    """The processes of a launch: which of them this one is, where it computes, and what all of them know together.

    Args:
        precision: of autocast, for those that train.
        cpu: compute on the CPU where there is a GPU, too.
    """

    def __init__(self, precision: str = "fp32", cpu: bool = False) -> None:
        self._start_accelerate(precision, cpu)
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.is_local_main = self.accelerator.is_local_main_process
        self.node = _node()
        if self.is_main and _restarts_may_hang(os.environ):
            log.warning(
                "the launcher may start processes again, and they would look for each other in the store of those that are "
                "gone, and may hang: launch with --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
            )

    def _start_accelerate(self, precision: str, cpu: bool) -> None:
        """Process group and device. Accelerate hears nothing of DeepSpeed: it would ask for transformers."""
        AcceleratorState._reset_state()  # engines may follow each other in one process; the process group stays
        with _environment("ACCELERATE_USE_DEEPSPEED", "false"):
            self.accelerator = Accelerator(
                cpu=cpu or not torch.cuda.is_available(),
                mixed_precision=_PRECISION[precision],
                kwargs_handlers=[
                    DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30)),
                ],
            )

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

    def largest(self, value: float) -> float:
        """The largest over ranks, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.item()

    def on_node(self, value: Any) -> list[Any]:
        """What every rank of this machine gave, in the order of ranks; all ranks of the run call it together.

        Of this machine are those whose processes see each other; in a container of its own a rank is alone.
        """
        if self.world_size == 1:
            return [value]
        place = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino)
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, (place, value))
        return [theirs for where, theirs in found if where == place]

    def union(self, words: Iterable[str]) -> list[str]:
        """All words that any rank gave, sorted; all ranks call it together."""
        found: list[list[str]] = [sorted(set(words))] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, found[self.rank])
        return sorted({word for part in found for word in part})

    def count_known(self, batch: Batch) -> Batch:
        """The batch with `known` counted by all ranks together, which on each was counted from the plan: for labels that
        depend on what another rank could decode."""
        known = (batch.attributes >= 0).sum(0).to(batch.known.dtype)
        return dataclasses.replace(batch, known=self.reduce_sum(known) / self.world_size)

    def wait(self) -> None:
        """A barrier."""
        self.accelerator.wait_for_everyone()


def leave() -> None:
    """End this process's part in its group, if it has one, when nothing is to be said to other ranks any more.

    A process that exits while the group stands may abort in the group's threads, which a launcher takes for a crash.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Engine(Ranks):
    """Trains a method's phases on one process or many.

    With `accumulation` k a rank takes its share of each batch in k parts, one after another: k times less memory, the
    same gradient. Batch norm's statistics are then those of each part over all ranks, so only a method without batch
    norm ends with the same weights for every k; running statistics move k times an update.

    Args:
        method: its networks are moved to the device and trained in place. Every rank must have built them alike.
        precision: "fp32", "bf16" or "fp16" (autocast around the whole loss; weights and optimizer stay float32).
        seed: of dropout, which is keyed by (seed, stream, draw, rank).
        settings: back end and what goes with it.

    Raises:
        ValueError: launcher and experiment disagree; fp16 without CUDA; a network stands in two groups.
    """

    def __init__(
        self, method: Method, *, precision: str = "fp32", seed: int = 0, settings: EngineConfig = EngineConfig()
    ) -> None:
        launcher = _Launcher.read()
        launcher.check_precision(precision)
        if precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("precision: fp16 needs CUDA, and there is none here; use bf16 or fp32")
        if settings.backend == "ddp" and launcher.deepspeed is not None:
            raise ValueError("the launcher says DeepSpeed, the experiment says engine.backend: ddp; leave one out")
        super().__init__(precision)
        if precision == "bf16" and self.device.type == "cpu" and self.is_main and not _has_bf16():
            log.warning(
                "this processor computes bf16 step by step in float32: expect a twentieth of the speed of precision: fp32"
            )
        self.method = method
        self.seed = seed
        self.settings = settings
        self.networks = nn.ModuleDict(method.networks).to(self.device)
        self._reduce_sums()
        deepspeed = settings.backend == "deepspeed" or launcher.deepspeed is not None
        self.backend = "deepspeed" if deepspeed else "ddp" if self.world_size > 1 else "single"
        kind = _DeepSpeedGroup if deepspeed else _Group
        self.groups = {t: kind(t, group, self.networks) for t, group in method.optimizers().items()}
        self._check_phases()
        for group in self.groups.values():
            group.loss_scale = LossScale(self.device) if precision == "fp16" else None
        if deepspeed:
            self._wrap_in_deepspeed(launcher.deepspeed or {})
        else:
            self._wrap_in_accelerate()
        self._require_gradients(())
        self._own_statistics = [
            buffer
            for module in self.networks.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.world_size > 1
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def _wrap_in_accelerate(self) -> None:
        for group in self.groups.values():
            self._require_gradients(group.trains)
            with warnings.catch_warnings():  # torch 2.11 knows only the argument that torch 2.13 calls deprecated
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                group.wrapped = self.accelerator.prepare_model(GroupLoss(self.networks))
            if self.backend == "ddp" and self.settings.gradient_compression == "bf16":
                group.wrapped.register_comm_hook(None, _reduce_in_bf16)

    def _wrap_in_deepspeed(self, launched: Mapping[str, Any]) -> None:
        shared = _deepspeed_settings(launched, self.settings, [g.settings.clip_norm for g in self.groups.values()])
        deepspeed = _import_deepspeed(self.device)
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        for group in self.groups.values():
            self._require_gradients(group.trains)
            size = sum(p.numel() for p in group.parameters)
            buckets = {"reduce_bucket_size": size, "allgather_bucket_size": size + size % 2}
            settings = {
                **shared,
                "gradient_clipping": group.settings.clip_norm,  # DeepSpeed clips at 1.0 when nothing is said
                "zero_optimization": {**buckets, **shared["zero_optimization"]},
            }
            with _environment("LOCAL_RANK", str(self.accelerator.local_process_index)):
                group.wrap(deepspeed, _Unfolded(self.networks, self.accelerator.autocast), settings)

    # --- one update -------------------------------------------------------------------------------------------------

    def update(self, phase: Phase, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """One update of one phase: its networks move, nothing else does.

        A loss or gradient that is not finite changes nothing, on the device and without waiting for it.

        Returns:
            The loss's report as detached scalars, this rank's parts of means over the global batch; with
            NAME/gradient_norm and NAME/skipped (1 when the update was left out; under fp16, where a scale that is too
            large costs an update now and then, only when none was too large), and NAME/loss_scale under fp16.

        Raises:
            ValueError: a rank has fewer records than parts to take them in.
        """
        self._stand(phase)
        torch.manual_seed(key_of(self.seed, "dropout", batch.draws.stream, batch.draws.draw, self.rank))
        context = Context(clock, self.reduce_sum)
        if not phase.trains:
            with torch.no_grad(), self.accelerator.autocast():
                report = _detached(phase.loss(self.networks, batch, context).report)
            self._average_own_statistics()
            return report
        group = self.groups[phase.trains]
        images = batch.size * self.world_size
        group.set_rate(self._rate_factor(images, clock), clock)
        moving = [network for network in self.networks.values() if network.training]  # in eval mode nothing takes note
        buffers = [buffer for network in moving for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        losses = group.accumulate(phase.loss, _parts(batch, self.settings.accumulation), context)
        norm, finite = group.step()
        for buffer, old in zip(buffers, before):
            buffer.copy_(torch.where(finite > 0, buffer, old))
        self._average_own_statistics()
        self._follow(group, images, finite)
        report = _mean_report(losses)
        report[f"{phase.name}/gradient_norm"] = norm
        report[f"{phase.name}/skipped"] = 1.0 - finite
        if group.loss_scale is not None:
            report[f"{phase.name}/loss_scale"] = group.loss_scale.scale
            report[f"{phase.name}/skipped"] = group.loss_scale.update(finite)
        return report

    def _rate_factor(self, images: float, clock: Clock) -> float:
        """What this batch size, at this moment, makes of the learning rates."""
        settings = self.settings
        scale = (images / settings.reference_batch_size) ** _LR_POWER[settings.lr_scaling]
        return ramp(scale, clock.stage_images + round(images), over=settings.warmup_images)

    def _stand(self, phase: Phase) -> None:
        """The phase's networks train; the others stand as it says, and hold no gradient."""
        for name, network in self.networks.items():
            network.train(name in phase.trains or name in phase.refreshes or phase.others == "train")
        self._require_gradients(phase.trains)

    def _require_gradients(self, trains: Iterable[str]) -> None:
        for name, network in self.networks.items():
            network.requires_grad_(name in trains)

    @torch.no_grad()
    def _average_own_statistics(self) -> None:
        """Running statistics that each rank keeps of its own share (`norm: local`) become their mean over ranks."""
        if not self._own_statistics:
            return
        total = torch.cat(self._own_statistics)
        dist.all_reduce(total)
        sizes = [len(buffer) for buffer in self._own_statistics]
        for buffer, mean in zip(self._own_statistics, (total / self.world_size).split(sizes)):
            buffer.copy_(mean)

    @torch.no_grad()
    def _follow(self, group: _Group, images: float, finite: Tensor) -> None:
        """The moving average goes a step towards the weights, and its statistics towards theirs.

        Running statistics taken as they are would belong to other weights: on CelebA at 250,000 images the averaged
        weights with the newest statistics reconstructed at an MSE of 0.186, the raw weights at 0.061.
        """
        if not group.ema:
            return
        weight = finite * (1.0 - ema_decay(group.settings.ema_half_life, images))
        for name, average in group.ema.items():
            for old, new in zip(average.parameters(), self.networks[name].parameters()):
                old.lerp_(new, weight.to(old.dtype))
            for old, new in zip(average.buffers(), self.networks[name].buffers()):
                if old.is_floating_point():
                    old.lerp_(new, weight.to(old.dtype))
                else:
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
                    raise ValueError(f"{self.method.name}: no optimizer trains {phase.trains} of phase {phase.name}")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts the method's networks are their moving averages, where a group keeps them."""
        raw = dict(self.method.networks)
        for group in self.groups.values():
            self.method.networks.update(group.ema)
        try:
            yield
        finally:
            self.method.networks.update(raw)

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """A copy on the CPU that further training leaves alone. All ranks ask for it together; all get the whole."""
        networks = {f"{n}/{k}": _cpu(v) for n, m in self.networks.items() for k, v in m.state_dict().items()}
        ema, optimizers = {}, {}
        for trains, group in self.groups.items():
            for name, average in group.ema.items():
                ema |= {f"{name}/{k}": _cpu(v) for k, v in average.state_dict().items()}
            optimizers |= group.moments()
            if group.loss_scale is not None:
                optimizers[f"{'+'.join(trains)}/loss_scale"] = _cpu(group.loss_scale.scale)
        return State(networks, ema, optimizers)

    def load(self, state: State) -> None:
        """Restore what `state` gave, on any back end and number of ranks.

        Raises:
            ValueError: the state is of other networks.
        """
        _load_networks(self.networks, state.networks, "checkpoint")
        for group in self.groups.values():
            if group.ema:
                _load_networks(nn.ModuleDict(group.ema), state.ema, "checkpoint's moving average")
            moments: dict[str, dict[str, Tensor]] = {name: {} for name in group.names}
            for path, value in state.optimizers.items():
                name, _, key = path.rpartition("/")
                if name in moments:
                    moments[name][key] = value
            group.load_moments(moments)
            scale = state.optimizers.get(f"{'+'.join(group.trains)}/loss_scale")
            if group.loss_scale is not None and scale is not None:
                group.loss_scale = LossScale(self.device, float(scale))


def _node() -> str | None:
    """This machine's name, as Slurm says it or else the machine; None for a run of one machine."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:  # the launcher counts machines there
        return None
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _has_bf16() -> bool:
    """Whether this processor's own instructions compute bf16 convolutions."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _restarts_may_hang(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that restarts shares one store between all its rounds, as torch 2.13 does unless told otherwise."""
    restarts, ranks = (int(environment.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "WORLD_SIZE"))
    return restarts > 0 and ranks > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


_NOTHING = contextlib.nullcontext()


def _reduce_in_bf16(state, bucket):
    """DDP's hook for bf16 gradients on any back end (torch's own takes NCCL only, and reads annotations as objects)."""
    small = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    reduced = dist.all_reduce(small, async_op=True).get_future()
    return reduced.then(lambda future: bucket.buffer().copy_(future.value()[0]))


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
            batch,
            images=None if batch.images is None else batch.images[cut],
            attributes=batch.attributes[cut],
            index=batch.index[cut],
            draws=dataclasses.replace(batch.draws, index=batch.draws.index[cut]),
            size=batch.size / count,
            known=batch.known / count,
        )
        for cut in cuts
    ]


def _mean_report(losses: Sequence[Loss]) -> dict[str, Tensor]:
    reports = [_detached(loss.report) for loss in losses]
    if len(reports) == 1:
        return reports[0]
    return {name: torch.stack([report[name] for report in reports]).mean(0) for name in reports[0]}


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
    """Scale all gradients to an L2 norm of at most `clip_norm` (0 = leave them). Returns norm before; 1 if finite."""
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
