"""Feature quantisation: against its definition, on one rank and two, and what it costs in a GAN's losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fader.networks.quantisation import Quantisation, taken_costs
from tests.fader.tiny import context, phases, planted, stand, tiny

KEYS, CHANNELS, DECAY = 5, 3, 0.8


def layer() -> Quantisation:
    torch.manual_seed(0)
    return Quantisation(CHANNELS, KEYS, DECAY).double()


def by_definition(x: Tensor, counts: list[float], sums: list[Tensor]) -> tuple[Tensor, list[float], list[Tensor]]:
    """The nearest keys of features, and the dictionary afterwards, a pixel at a time."""
    total = sum(counts)
    keys = [m / ((n + 1e-5) / (total + KEYS * 1e-5) * total) for n, m in zip(counts, sums)]
    nearest, numbers, parts = torch.empty_like(x), [0] * KEYS, [torch.zeros(CHANNELS, dtype=x.dtype) for _ in range(KEYS)]
    for n in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                k = min(range(KEYS), key=lambda k: float((x[n, :, i, j] - keys[k]).square().sum()))
                nearest[n, :, i, j] = keys[k]
                numbers[k] += 1
                parts[k] = parts[k] + x[n, :, i, j]
    counts = [DECAY * n + (1 - DECAY) * number for n, number in zip(counts, numbers)]
    return nearest, counts, [DECAY * m + (1 - DECAY) * part for m, part in zip(sums, parts)]


def test_it_is_its_definition():
    """Output, costs and dictionary over three passes; gradients pass as if nothing had happened; eval mode moves nothing."""
    quantised, counts = layer(), [1.0] * KEYS
    sums = list(quantised.sums.clone())
    for number in range(3):
        x = torch.randn(4, CHANNELS, 2, 3, dtype=torch.float64, requires_grad=True)
        nearest, counts, sums = by_definition(x.detach(), counts, sums)
        output, direction = quantised(x), torch.randn_like(x)
        torch.testing.assert_close(output, nearest, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(output, x, direction, retain_graph=True)[0], direction)
        (costs,) = taken_costs(quantised)
        torch.testing.assert_close(costs, (x - nearest).square().mean((1, 2, 3)), rtol=1e-12, atol=1e-12)
        (pull,) = torch.autograd.grad(costs.sum(), x)
        torch.testing.assert_close(pull, 2 * (x - nearest).detach() / x[0].numel(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quantised.counts, torch.tensor(counts, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quantised.sums, torch.stack(sums), rtol=1e-12, atol=1e-12)
    assert len(set(counts)) > 2 and taken_costs(quantised) == []
    before = copy.deepcopy(quantised.state_dict())
    quantised.eval()(x.detach())
    assert all(torch.equal(before[name], value) for name, value in quantised.state_dict().items())


@pytest.mark.parametrize("first", [3, 1, 0])
def test_uneven_shares_of_two_ranks_equal_the_whole_batch(first):
    whole, x = layer(), torch.randn(6, CHANNELS, 2, 2, dtype=torch.float64)
    want = whole(x)
    sums: list[Tensor] = []
    for share in (x[:first], x[first:]):
        rank = layer()
        rank.reduce_sum = lambda tensor: sums.append(tensor) or tensor
        rank(share)
    for share, part in ((x[:first], want[:first]), (x[first:], want[first:])):
        rank = layer()
        rank.reduce_sum = lambda tensor: sums[0] + sums[1]
        torch.testing.assert_close(rank(share), part, rtol=1e-12, atol=1e-12)
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(rank.buffers(), whole.buffers()))
    alone = layer()
    alone(x[:3])
    assert (alone.sums - whole.sums).abs().max() > 1e-10  # what a rank sees alone is another thing


def test_a_key_that_nothing_is_near_to_stays_finite_and_others_follow_their_features():
    quantised = layer()
    middle = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    for _ in range(200):
        quantised(middle[None, :, None, None].expand(2, -1, 2, 2))
    distances = (quantised.keys - middle).square().sum(1)
    assert distances.min() < 1e-8 and torch.isfinite(quantised.keys).all() and quantised.keys.abs().max() < 10


@pytest.mark.parametrize("name", ["cgan", "icgan", "vacgan"])
@pytest.mark.parametrize("changes", [{}, {"latent_step": 0.9}], ids=["", "with latent optimisation"])
def test_both_sides_of_a_gan_pay_for_features_off_their_keys(name, changes):
    """The loss is the weight times costs beside what it was; the generator learns from them, too."""
    batch, values, gradients = planted(), {}, {}
    for weight in (0.0, 1.0, 2.0):
        method = tiny(name, quantised_keys=8, quantised_weight=weight, **changes)
        for phase in (phases(method)["discriminator"], phases(method)["generator"]):
            stand(method, phase)
            state = copy.deepcopy(method.networks["discriminator"].state_dict())
            loss = phase.loss(method.networks, batch, context(method)).value
            parameters = list(method.networks[phase.name].parameters())
            gradients[phase.name, weight] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            method.networks["discriminator"].load_state_dict(state)
            values[phase.name, weight] = loss.item()
            assert taken_costs(method.networks["discriminator"]) == []
    for side in ("discriminator", "generator"):
        step = values[side, 1.0] - values[side, 0.0]
        assert step > 1e-3 and values[side, 2.0] - values[side, 1.0] == pytest.approx(step, rel=1e-3)
        assert not torch.equal(gradients[side, 1.0], gradients[side, 0.0])


def test_the_keys_stand_after_the_discriminators_second_layer():
    for name, position in (("cgan", 1), ("vacgan", 4)):
        discriminator = tiny(name, image_size=64, quantised_keys=16).networks["discriminator"]
        assert isinstance(discriminator.layers[position], Quantisation)
        shapes = []
        discriminator.layers[position].register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape[2:]))
        code = [torch.zeros(2, tiny(name).attributes.code_width)] if name == "cgan" else []
        discriminator(torch.zeros(2, 3, 64, 64), *code)
        assert shapes == [(16, 16)]
