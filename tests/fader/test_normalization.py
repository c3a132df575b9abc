"""Batch norm over the global batch equals torch's batch norm of the whole batch, twice differentiable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fader.method import Context, identity
from fader.networks.normalization import BatchNorm, norm

TOLERANCE = 1e-12


def one_rank(tensor: Tensor) -> Tensor:
    """A sum over one rank that is not `identity`, so that the reduced path runs."""
    return tensor * 1.0


def pair(shape: tuple[int, ...], offset: float = 0.0) -> tuple[nn.BatchNorm2d, BatchNorm, Tensor]:
    """torch's layer and ours with the same weights, and an input; float64."""
    torch.manual_seed(0)
    theirs = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1]).double()
    ours = BatchNorm(shape[1]).double()
    for layer in (theirs, ours):
        nn.init.uniform_(layer.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(layer.bias, -1, 1, generator=torch.Generator().manual_seed(2))
    return theirs, ours, torch.randn(shape, dtype=torch.float64) * 2 + offset


def forward_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, first-order gradients, and the gradients of a penalty on the input's gradient."""
    x = x.clone().requires_grad_(True)
    y = layer(x)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    penalty = first.square().sum()
    return [y, first, *torch.autograd.grad(penalty, [x, *layer.parameters()])]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (8, 5)])
@pytest.mark.parametrize("reduce_sum", [None, one_rank])
def test_equals_torchs_batch_norm(shape, reduce_sum):
    theirs, ours, x = pair(shape, offset=3.0)
    if reduce_sum:
        ours.reduce_sum = reduce_sum
    for _ in range(3):
        assert largest_difference(forward_and_gradients(ours, x), forward_and_gradients(theirs, x)) < TOLERANCE
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert largest_difference(list(ours.state_dict().values()), list(theirs.state_dict().values())) < TOLERANCE
    assert torch.equal(ours.num_batches_tracked, torch.tensor(3))
    ours.eval(), theirs.eval()
    assert largest_difference([ours(x)], [theirs(x)]) < TOLERANCE


class TwoRanks(nn.Module):
    """Two copies of a layer in one process, that hold uneven shares of a batch and see each other's sums."""

    def __init__(self, layer: BatchNorm, first: int) -> None:
        super().__init__()
        self.layer = layer
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        before = [buffer.clone() for buffer in self.layer.buffers()]
        sums: list[Tensor] = []

        def run(share: Tensor, reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
            for buffer, value in zip(self.layer.buffers(), before):
                buffer.copy_(value)
            self.layer.reduce_sum = reduce_sum
            return self.layer(share)

        def record(tensor: Tensor) -> Tensor:
            sums.append(tensor)
            return tensor * 1.0

        shares = (x[: self.first], x[self.first :])
        for share in shares:
            run(share, record)
        outputs, after = [], []
        for share in shares:
            outputs.append(run(share, lambda tensor: sums[0] + sums[1]))
            after.append([buffer.clone() for buffer in self.layer.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(*after)), "ranks' buffers differ"
        return torch.cat(outputs)


@pytest.mark.parametrize("first", [3, 1, 0])
def test_uneven_shares_of_two_ranks_equal_the_whole_batch(first):
    theirs, ours, x = pair((6, 3, 4, 4), offset=3.0)
    got, want = forward_and_gradients(TwoRanks(ours, first), x), forward_and_gradients(theirs, x)
    assert largest_difference(got, want) < TOLERANCE
    assert largest_difference(list(ours.state_dict().values()), list(theirs.state_dict().values())) < TOLERANCE


def test_each_planted_fault_exceeds_the_tolerance_a_hundred_times():
    """Statistics of one share; sums that carry no gradient; the biased variance in the running statistics."""
    theirs, ours, x = pair((6, 3, 4, 4))
    want = forward_and_gradients(theirs, x)
    shares = lambda x: torch.cat([ours(x[:3]), ours(x[3:])])  # noqa: E731
    shares.parameters = ours.parameters
    assert largest_difference(forward_and_gradients(shares, x), want) > 100 * TOLERANCE
    ours.reduce_sum = lambda tensor: tensor.detach()
    assert largest_difference(forward_and_gradients(ours, x), want) > 100 * TOLERANCE
    biased = x.var((0, 2, 3), correction=0) * 0.1 + 0.9
    assert (biased - theirs.running_var).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("reduce_sum", [None, one_rank])
def test_statistics_are_float32_under_autocast(reduce_sum):
    """A mean of 40 and a deviation of 1: half precision would keep neither."""
    layer = BatchNorm(4)
    if reduce_sum:
        layer.reduce_sum = reduce_sum
    x = (torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_(True))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
    wide = x.detach().double()
    assert torch.allclose(layer.running_mean.double(), 0.1 * wide.mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(layer.running_var.double(), 0.9 + 0.1 * wide.var((0, 2, 3)), rtol=1e-4)
    want = torch.nn.functional.batch_norm(wide, None, None, training=True)
    assert (y.double() - want).abs().max() < 0.02


def test_a_large_mean_costs_no_digits_once_the_running_mean_has_settled():
    layer = BatchNorm(2)
    layer.reduce_sum = one_rank
    torch.manual_seed(0)
    for _ in range(200):
        layer(torch.randn(32, 2, 4, 4) + 1000)
    x = torch.randn(32, 2, 4, 4) + 1000
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    assert (layer(x).double() - want).abs().max() < 1e-3


def test_layers_take_the_sum_over_ranks_from_the_context():
    nets = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 2, 1), BatchNorm(2)), "b": nn.BatchNorm2d(2)})
    Context({}, one_rank).connect(nets)
    assert nets["a"][1].reduce_sum is one_rank and not hasattr(nets["b"], "reduce_sum")
    assert BatchNorm(2).reduce_sum is identity


@pytest.mark.parametrize("reduce_sum", [None, one_rank])
def test_channels_last_stays_channels_last(reduce_sum):
    layer = BatchNorm(4)
    if reduce_sum:
        layer.reduce_sum = reduce_sum
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_kinds():
    assert isinstance(norm("global", 3), BatchNorm)
    local = norm("local", 3)
    assert isinstance(local, nn.BatchNorm2d) and not hasattr(local, "reduce_sum")
    instance = norm("instance", 3)
    assert isinstance(instance, nn.InstanceNorm2d) and instance.affine
    with pytest.raises(ValueError, match="none of global, local, instance"):
        norm("batch", 3)
    with pytest.raises(ValueError, match=r"takes \[N, 3"):
        BatchNorm(3)(torch.zeros(2, 4, 1, 1))
    with pytest.raises(ValueError):
        BatchNorm(3)(torch.zeros(1, 3, 1, 1))
