"""Normalisation over the global batch, this rank's share of it, or each image alone."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fader.method import SumsOverRanks, identity

Norm = Literal["global", "local", "instance"]


class BatchNorm(SumsOverRanks):
    """Batch normalisation whose statistics are sums over the records of the global batch.

    On one process it is torch's own batch norm. On several, `reduce_sum` is a differentiable sum over ranks, and the
    sums of all channels travel in one call: output, gradients (of first and second order) and running statistics are
    then those of one process with the whole batch, and equal on every rank. Statistics are float32 under autocast and
    float64 for float64 input. Parameters and buffers are named as in torch.nn.BatchNorm2d; the running variance is the
    unbiased one, as there.

    channels: C of inputs [N, C, ...]. momentum: weight of the newest batch in the running statistics. eps: added to the variance.
    Source: Ioffe, Szegedy 2015, arXiv:1502.03167, algorithm 1; shifted sums: Chan, Golub, LeVeque 1983, eq. 1.7.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] to the same shape, each channel with mean `bias` and standard deviation `weight`.
        Raises ValueError: the number of channels is wrong; or, on one process, a channel has one value, so no variance."""
        if x.ndim < 2 or x.shape[1] != len(self.weight):
            raise ValueError(f"input is {tuple(x.shape)}; this batch norm takes [N, {len(self.weight)}, ...]")
        if self.training:
            self.num_batches_tracked.add_(1)
            if self.reduce_sum is not identity:
                return self._global(x)
            check_variance(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _global(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        channels = x.shape[1]
        # The sums are of distances from the running mean, which is the same on every rank, because E[d²] - E[d]² then loses
        # no digits once the mean has settled.
        shift = self.running_mean.detach().to(wide.dtype, copy=True)
        d = wide - shift.view(shape)
        count = wide.new_full((1,), x.numel() / channels)
        total = self.reduce_sum(torch.cat([d.sum(dims), d.square().sum(dims), count]))
        n = total[-1].detach()
        mean = total[:channels] / n
        variance = (total[channels : 2 * channels] / n - mean.square()).clamp(min=0)
        with torch.no_grad():
            unbiased = variance * (n / (n - 1).clamp(min=1))
            self.running_mean.lerp_((shift + mean).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul((self.bias - mean * scale).view(shape), d, scale.view(shape)).to(x.dtype)


class LocalBatchNorm(nn.BatchNorm2d):
    """torch's own batch norm, over the records of this rank."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            check_variance(x)
        return super().forward(x)


def check_variance(x: Tensor) -> None:
    """Raise ValueError when each channel of a batch [N, C, ...] has one value, and so no variance."""
    if x.numel() <= x.shape[1]:
        raise ValueError(
            f"batch norm needs two values a channel to learn, and a batch of {len(x)} whose maps are one pixel has no two: "
            "raise batch_size, or take fewer processes or parts (engine.accumulation)"
        )


def norm(kind: Norm, channels: int) -> nn.Module:
    """The normalisation layer of [N, channels, H, W] called `kind`.
    global: batch norm over all ranks. local: batch norm over this rank's records; its running statistics differ from rank to
    rank, so whoever reads them averages. instance: each image alone, with a scale and an offset a channel.
    Raises ValueError: there is no such kind."""
    if kind == "global":
        return BatchNorm(channels)
    if kind == "local":
        return LocalBatchNorm(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    raise ValueError(f"norm {kind!r} is none of {', '.join(get_args(Norm))}")


def drop_bias(parent: nn.Module, layer: str, norm: str) -> None:
    """Take the bias from a layer of `parent` whose norm, which follows it, takes a bias out again: nothing computes it.
    Checkpoints hold it still, as zeros. The running mean is moved by the bias that was drawn, and by that of a checkpoint that
    was written while it was computed, so that the network in eval mode stays the same."""
    bias = parent.get_submodule(layer).bias.detach()
    size = len(bias)
    parent.get_submodule(layer).register_parameter("bias", None)
    if isinstance(parent.get_submodule(norm), (BatchNorm, LocalBatchNorm)):
        parent.get_submodule(norm).running_mean.sub_(bias)

    def save(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Mapping[str, Any]) -> None:
        state[f"{prefix}{layer}.bias"] = module.get_submodule(norm).weight.new_zeros(size, requires_grad=False)

    def load(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        bias, mean = state.pop(f"{prefix}{layer}.bias", None), f"{prefix}{norm}.running_mean"
        if bias is not None and mean in state:
            state[mean] = state[mean] - bias

    parent.get_submodule(norm).kept_bias = size
    parent.register_state_dict_post_hook(save)
    parent.register_load_state_dict_pre_hook(load)


def num_parameters(network: nn.Module) -> int:
    """How many numbers the network has learnt, as publications count them: biases that `drop_bias` took are among them."""
    dropped = sum(getattr(module, "kept_bias", 0) for module in network.modules())
    return dropped + sum(parameter.numel() for parameter in network.parameters())
