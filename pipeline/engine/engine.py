"""The engine: a method's phases, each an update of one trained group on whatever back end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fader.draws import key_of
from fader.method import Batch, Clock, Context, Loss, Method, Phase
from fader.schedules import ema_decay, ramp
from pipeline.config import EngineConfig
from pipeline.engine.groups import Group, GroupLoss, LossScale, reduce_in_bf16
from pipeline.engine.launcher import Launcher, environment
from pipeline.engine.ranks import Ranks
from pipeline.engine.state import State, load_networks, on_cpu
from pipeline.engine.zero import UnfoldedLoss, ZeroGroup, import_deepspeed, zero_settings

log = logging.getLogger(__name__)

_LR_POWER = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


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
        launcher = Launcher.read()
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
        self.weights = {name: torch.zeros((), device=self.device) for name in method.schedules()}
        self.context = Context(self.weights, self.reduce_sum)
        self.context.connect(self.networks)
        deepspeed = settings.backend == "deepspeed" or launcher.deepspeed is not None
        self.backend = "deepspeed" if deepspeed else "ddp" if self.world_size > 1 else "single"
        kind = ZeroGroup if deepspeed else Group
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
                group.wrapped.register_comm_hook(None, reduce_in_bf16)

    def _wrap_in_deepspeed(self, launched: Mapping[str, Any]) -> None:
        shared = zero_settings(launched, self.settings, [g.settings.clip_norm for g in self.groups.values()])
        deepspeed = import_deepspeed(self.device)
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
            with environment("LOCAL_RANK", str(self.accelerator.local_process_index)):
                group.wrap(deepspeed, UnfoldedLoss(self.networks, self.accelerator.autocast), settings)

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
        torch.manual_seed(key_of(self.seed, "dropout", batch.draws.host_key, self.rank))
        for name, schedule in self.method.schedules().items():
            self.weights[name].fill_(schedule.at(clock.images))
        if not phase.trains:
            with torch.no_grad(), self.accelerator.autocast():
                report = _detached(phase.loss(self.networks, batch, self.context).report)
            self._average_own_statistics()
            return report
        group = self.groups[phase.trains]
        group.set_rate(self._rate_factor(batch.records, clock), clock)
        moving = [network for network in self.networks.values() if network.training]  # in eval mode nothing takes note
        buffers = [buffer for network in moving for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        losses = group.accumulate(phase.loss, _parts(batch, self.settings.accumulation), self.context)
        norm, finite = group.step()
        for buffer, old in zip(buffers, before):
            buffer.copy_(torch.where(finite > 0, buffer, old))
        self._average_own_statistics()
        self._follow(group, batch.records, finite)
        report = _mean_report(losses)
        report[f"{phase.name}/gradient_norm"] = norm
        report[f"{phase.name}/skipped"] = 1.0 - finite
        if group.loss_scale is not None:
            report[f"{phase.name}/loss_scale"] = group.loss_scale.scale
            report[f"{phase.name}/skipped"] = group.loss_scale.update(finite)
        return report

    def _rate_factor(self, images: int, clock: Clock) -> float:
        """What this batch size, at this moment, makes of the learning rates."""
        settings = self.settings
        scale = (images / settings.reference_batch_size) ** _LR_POWER[settings.lr_scaling]
        return ramp(scale, clock.stage_images + images, over=settings.warmup_images)

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
    def _follow(self, group: Group, images: int, finite: Tensor) -> None:
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
        networks = {f"{n}/{k}": on_cpu(v) for n, m in self.networks.items() for k, v in m.state_dict().items()}
        ema, optimizers = {}, {}
        for trains, group in self.groups.items():
            for name, average in group.ema.items():
                ema |= {f"{name}/{k}": on_cpu(v) for k, v in average.state_dict().items()}
            optimizers |= group.moments()
            if group.loss_scale is not None:
                optimizers[f"{'+'.join(trains)}/loss_scale"] = on_cpu(group.loss_scale.scale)
        return State(networks, ema, optimizers)

    def load(self, state: State) -> None:
        """Restore what `state` gave, on any back end and number of ranks.

        Raises:
            ValueError: the state is of other networks.
        """
        load_networks(self.networks, state.networks, "checkpoint")
        for group in self.groups.values():
            if group.ema:
                load_networks(nn.ModuleDict(group.ema), state.ema, "checkpoint's moving average")
            moments: dict[str, dict[str, Tensor]] = {name: {} for name in group.names}
            for path, value in state.optimizers.items():
                name, _, key = path.rpartition("/")
                if name in moments:
                    moments[name][key] = value
            group.load_moments(moments)
            scale = state.optimizers.get(f"{'+'.join(group.trains)}/loss_scale")
            if group.loss_scale is not None and scale is not None:
                group.loss_scale = LossScale(self.device, float(scale))


def _has_bf16() -> bool:
    """Whether this processor's own instructions compute bf16 convolutions."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def _detached(report: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).detach() for name, value in report.items()}
