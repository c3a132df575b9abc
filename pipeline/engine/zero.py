"""DeepSpeed's ZeRO-0, 1, 2 behind a trained group, and its settings. DeepSpeed is imported only when it is asked for."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fader.method import Batch, Context, Loss, LossFunction
from pipeline.config import EngineConfig
from pipeline.engine.groups import AutocastLoss, Group
from pipeline.engine.state import on_cpu


class UnfoldedLoss(AutocastLoss):
    """The module that DeepSpeed wraps, which finds tensors in tuples but not in dataclasses, and turns autocast off."""

    def forward(self, loss: LossFunction, batch: Batch, context: Context) -> tuple[Tensor, Mapping[str, Any]]:
        value_and_report = super().forward(loss, batch, context)
        return value_and_report.value, value_and_report.report


class ZeroGroup(Group):
    """One trained group behind a DeepSpeed engine of its own.
    At stages 1 and 2 each rank holds an equal slice of one flat vector: the group's float32 parameters in order, padded at the
    end. Its moments are slices of the same cut, so they are gathered and cut by position."""

    stage = 0

    def wrap(self, deepspeed: Any, loss: UnfoldedLoss, settings: dict[str, Any]) -> None:
        self.stage = settings["zero_optimization"]["stage"]
        if self.stage:
            self.optimizer.state.clear()  # it belongs to the flat vector
        self.wrapped, *_ = deepspeed.initialize(
            model=loss, optimizer=self.optimizer, model_parameters=self.parameters, config=settings, dist_init_required=False
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
        """This rank's float32 part of the flat vector, which is what the optimizer really moves."""
        (held,) = self.wrapped.optimizer.single_partition_of_fp32_groups
        return held

    def _cut(self, tensors: Sequence[Tensor]) -> Tensor:
        """Cut this rank's slice out of the flat vector of one tensor a parameter."""
        held = self._slice
        flat = held.new_zeros(held.numel() * dist.get_world_size())
        torch.cat([t.reshape(-1).to(flat) for t in tensors], out=flat[: sum(t.numel() for t in tensors)])
        return flat.view(-1, held.numel())[dist.get_rank()].clone()

    def moments(self) -> dict[str, Tensor]:
        if not self.stage:
            return super().moments()
        held, tensors = self._slice, {}
        for key, value in sorted(self.optimizer.state.get(held, {}).items()):  # every rank gathers in the same order
            if not isinstance(value, Tensor):
                continue
            if value.shape != held.shape:  # the step count, one for all
                tensors |= {f"{name}/{key}": on_cpu(value) for name in self.names}
                continue
            slices = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(slices, value.contiguous())
            sizes = [p.numel() for p in self.parameters]
            whole = torch.cat(slices)[: sum(sizes)].split(sizes)
            tensors |= {f"{n}/{key}": on_cpu(v.view(p.shape)) for n, p, v in zip(self.names, self.parameters, whole)}
        return tensors

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


_OWNED = {  # keys of a DeepSpeed file, and which of the experiment's own says the same
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "optimizer": "the method's optimizers",
    "scheduler": "engine.lr_scaling and engine.warmup_images",
    "communication_data_type": "engine.gradient_compression",
    "torch_autocast": "precision",
}
_LEFT_OUT = ("bf16", "fp16", "amp", "gradient_accumulation_steps", "gradient_clipping", *_OWNED)
_REFUSED = ("offload_optimizer", "offload_param", "round_robin_gradients", "parameter_alignment")


def zero_settings(launched: Mapping[str, Any], settings: EngineConfig, clip_norms: Iterable[float]) -> dict[str, Any]:
    """Return DeepSpeed's settings that are the same for all groups.
    Raises ValueError: the launcher says something that the experiment says otherwise, or that cannot be."""
    zero = {key: value for key, value in launched.get("zero_optimization", {}).items() if value != "auto"}
    stage = zero.pop("stage", None)
    if stage is not None and settings.zero_stage not in (None, stage):
        ours = settings.zero_stage
        raise ValueError(f"the launcher says ZeRO stage {stage}, the experiment says engine.zero_stage: {ours}; leave one out")
    stage = settings.zero_stage if stage is None else stage
    stage = 1 if stage is None else stage
    if stage not in (0, 1, 2):
        why = "; ZeRO-3 is refused: it cuts up the weights themselves, which phases share" if stage == 3 else ""
        raise ValueError(f"ZeRO stage {stage} is none of 0, 1, 2{why}")
    for key in _REFUSED:
        value = zero.pop(key, None)
        if value and not (isinstance(value, Mapping) and value.get("device", "none") == "none"):
            raise ValueError(f"the launcher's DeepSpeed settings ask for {key}, which has no place here: leave it out")
    for key, owner in _OWNED.items():
        if launched.get(key, "auto") != "auto":
            raise ValueError(f"the launcher's DeepSpeed names {key}; the experiment owns it ({owner}); say auto")
    steps, clip = launched.get("gradient_accumulation_steps", "auto"), launched.get("gradient_clipping", "auto")
    if steps not in ("auto", settings.accumulation):
        parts = f"the experiment says engine.accumulation: {settings.accumulation}, which counts; leave out the launcher's"
        raise ValueError(f"the launcher says gradient_accumulation_steps {steps:g}, {parts}")
    other = [norm for norm in clip_norms if clip not in ("auto", norm)]
    if other:
        raise ValueError(f"the launcher says gradient_clipping {clip:g}, the method clips at {other[0]:g}; say auto there")
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
    """While this lasts, importing this module fails, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, told beforehand where to compute, without its messages."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _hidden("mlflow"):  # DeepSpeed's autotuner would import it on every rank: 1.8 of its 2.2 seconds
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # otherwise it compiles, at the first start on a machine, an operator for inference only
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
