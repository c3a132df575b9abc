"""The engine: a method's phases, each an update of one trained group on whatever back end."""

import contextlib
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import patch_environment
from torch import Tensor, nn

from fader.draws import key_of
from fader.method import Batch, Clock, Context, Method, Phase
from fader.networks.padding import pad_channels
from fader.schedules import ramp
from pipeline.config import EngineConfig
from pipeline.engine.capture import captured_steps, compile_networks
from pipeline.engine.groups import AutocastLoss, FlatGroup, Group, GroupLoss, LossScale, Scalar, reduce_in_bf16
from pipeline.engine.launcher import Launcher
from pipeline.engine.ranks import Ranks
from pipeline.engine.state import State, load_networks, on_cpu
from pipeline.engine.step import Step, Sums, like, shape_of
from pipeline.engine.zero import UnfoldedLoss, ZeroGroup, import_deepspeed, zero_settings

log = logging.getLogger(__name__)

_LR_POWER = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Engine(Ranks):
    """Trains a method's phases on one process or many.

    With `accumulation` k a rank takes its share of each batch in k parts, one after another: k times less memory, the same
    gradient. Batch norm's statistics are then those of each part over all ranks, so only a method without batch norm ends with
    the same weights for every k; running statistics move k times an update.
    method: its networks are moved to the device and trained in place. Every rank must have built them alike.
    precision: "fp32", "bf16" or "fp16" (autocast around the whole loss; weights and optimizer stay float32).
    seed: of dropout, which is keyed by (seed, stream, draw, rank). settings: back end and what goes with it.
    Raises ValueError: launcher and experiment disagree; fp16 without CUDA; a network stands in two groups.
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
        self.schedules = method.schedules()
        self.weights = {name: Scalar(self.device) for name in self.schedules}
        self.context = Context({name: weight.tensor for name, weight in self.weights.items()}, self.reduce_sum)
        self.context.connect(self.networks)
        self.steps: dict[Hashable, Step] = {}
        self.inputs: dict[Hashable, Batch] = {}
        self.sums: dict[Phase, Sums] = {}
        generators = torch.cuda.default_generators if self.device.type == "cuda" else [torch.default_generator]
        self._generator = generators[self.device.index or 0]
        self.networks.requires_grad_(False)
        self._requiring: tuple[str, ...] = ()  # networks whose parameters require gradients
        deepspeed = settings.backend == "deepspeed" or launcher.deepspeed is not None
        self.backend = "deepspeed" if deepspeed else "ddp" if self.world_size > 1 else "single"
        self.captured = captured_steps(settings.step, self.backend, self.device, self.is_main)
        flat = FlatGroup if self.backend == "ddp" and settings.step == "captured" else Group  # no graph takes DDP's hooks
        kind = ZeroGroup if deepspeed else flat
        self.groups = {t: kind(t, group, self.networks) for t, group in method.optimizers().items()}
        _check_phases(method, self.groups)
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
        if settings.channel_multiple > 1:
            pad_channels(self.networks, settings.channel_multiple)
        self.compiled: set[str] = set()
        if settings.compile == "networks":
            self.compiled = compile_networks(self.networks, method.differentiated_twice(), self.world_size, self.is_main)

    def _wrap_in_accelerate(self) -> None:
        for group in self.groups.values():
            self._require_gradients(group.trains)
            if isinstance(group, FlatGroup):
                group.compressed = self.settings.gradient_compression == "bf16"
            if self.backend == "single" or isinstance(group, FlatGroup):
                group.wrapped = AutocastLoss(self.networks, self.accelerator.autocast)
                continue
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
            with patch_environment(LOCAL_RANK=self.accelerator.local_process_index):
                group.wrap(deepspeed, UnfoldedLoss(self.networks, self.accelerator.autocast), settings)

    def update(self, phase: Phase, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Make one update of one phase, in which its networks move and nothing else does.

        The host writes what changes from update to update into the prepared step's memory; then the step runs. A loss or gradient
        that is not finite changes nothing, and the host does not wait to learn of it.
        Returns: The loss's report as detached scalars, which are this rank's parts of means over the global batch; with
        NAME/gradient_norm and NAME/skipped (1 when the update was left out; under fp16, where a scale that is too large costs an
        update now and then, only when none was too large), and NAME/loss_scale under fp16. They are valid until the next update,
        and summed on the device for `read_report`.
        Raises ValueError: a rank has fewer records than parts to take them in.
        """
        step = self._prepared(phase, batch)
        if self.captured is None or not self.captured.holds(step):
            self._stand(phase)
        self._generator.manual_seed(key_of(self.seed, "dropout", batch.draws.host_key, self.rank))
        for name, schedule in self.schedules.items():
            self.weights[name].set(schedule.at(clock.images))
        if step.group is not None:
            step.group.set_rates(self._rate_factor(batch.records, clock), clock, batch.records)
        step.fill(batch)
        step.sums.updates += 1
        return step.run() if self.captured is None else self.captured.run(step)

    def read_report(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return what updates have reported since the last reading: means over updates and ranks, and numbers of updates.
        All ranks read together, and each waits for its device once."""
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for sums in self.sums.values():
            for name, total in sums.take():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + sums.updates
            sums.updates = 0
        return self.mean({name: total / counts[name] for name, total in totals.items()}), counts

    def _prepared(self, phase: Phase, batch: Batch) -> Step:
        shape = shape_of(batch)
        if (phase, shape) not in self.steps:
            if shape not in self.inputs:
                self.inputs[shape] = like(batch, self.device)
            self.steps[phase, shape] = Step(
                phase=phase, group=self.groups.get(phase.trains), inputs=self.inputs[shape], networks=self.networks,
                context=self.context, sums=self.sums.setdefault(phase, Sums(self.device)), autocast=self.accelerator.autocast,
                accumulation=self.settings.accumulation, average=self._average_own_statistics,
            )
        return self.steps[phase, shape]

    def _rate_factor(self, images: int, clock: Clock) -> float:
        """Return the factor on all learning rates that this batch size and the warm-up give."""
        settings = self.settings
        scale = (images / settings.reference_batch_size) ** _LR_POWER[settings.lr_scaling]
        return ramp(scale, clock.stage_images + images, over=settings.warmup_images)

    def _stand(self, phase: Phase) -> None:
        """Set modes, and which parameters require gradients, where the phase wants them otherwise than they are."""
        for name, network in self.networks.items():
            training = name in phase.trains or phase.others == "train"
            if network.training != training:
                network.train(training)
        self._require_gradients(phase.trains)

    def _require_gradients(self, trains: tuple[str, ...]) -> None:
        for name in set(trains) ^ set(self._requiring):
            self.networks[name].requires_grad_(name in trains)
        self._requiring = trains

    @torch.no_grad()
    def _average_own_statistics(self) -> None:
        """Replace running statistics that each rank keeps of its own share (`norm: local`) by their mean over ranks."""
        if not self._own_statistics:
            return
        total = torch.cat(self._own_statistics)
        dist.all_reduce(total)
        sizes = [len(buffer) for buffer in self._own_statistics]
        for buffer, mean in zip(self._own_statistics, (total / self.world_size).split(sizes)):
            buffer.copy_(mean)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While this lasts, the method's networks are their moving averages, where a group keeps them."""
        raw = dict(self.method.networks)
        for group in self.groups.values():
            self.method.networks.update(group.ema)
        try:
            yield
        finally:
            self.method.networks.update(raw)

    def state(self) -> State:
        """Return a copy on the CPU that further training leaves alone. All ranks call it together and get the whole."""
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
        """Restore what `state` gave, on any back end and number of ranks. Raises ValueError: the state is of other networks."""
        self.steps.clear()  # the optimizers' moments get other memory
        if self.captured is not None:
            self.captured.forget()
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


def _check_phases(method: Method, groups: Mapping[tuple[str, ...], Group]) -> None:
    trained = [name for trains in groups for name in trains]
    twice = {name for name in trained if trained.count(name) > 1}
    if twice:
        raise ValueError(f"{method.name}: {', '.join(sorted(twice))} stands in two trained groups")
    for stage in method.stages():
        for phase in stage.phases:
            if phase.trains and phase.trains not in groups:
                raise ValueError(f"{method.name}: no optimizer trains {phase.trains} of phase {phase.name}")


def _has_bf16() -> bool:
    """Return whether this processor has instructions that compute bf16 convolutions."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
