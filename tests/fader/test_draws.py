"""Random numbers belong to their record: pinned, well spread, and the same however they are asked for."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fader.draws import Draws, key_of

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
GOLDEN_KEY = -7856034613949395812
GOLDEN_UNIFORM = [0.4734976887702942, 0.9625949263572693, 0.683696985244751]
GOLDEN_INTEGERS = [3, 0, 2]
GOLDEN_NORMAL = [-0.17121464014053345, -1.2663737535476685, 0.8231542110443115]


def mix(x: int) -> int:
    """SplitMix64's finaliser on Python integers: the reference."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference_bits(seed: int, stream: str, draw: int, record: int, name: str, position: int) -> int:
    key = mix((key_of(seed, stream, draw) + key_of(name)) & MASK)
    inner = mix((record * GOLDEN + key) & MASK)
    return mix(mix((inner + (position + 1) * GOLDEN) & MASK))


def of(index, seed=7, stream="fader", draw=3) -> Draws:
    return Draws.of(seed, stream, draw, torch.as_tensor(index, dtype=torch.int64))


def test_the_mixer_is_splitmix64():
    """The published first output of SplitMix64 seeded with 0."""
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF


def test_uniforms_follow_the_reference_bit_by_bit():
    index = [0, 1, 5, 202_598, 2**40]
    got = of(index).uniform("flip", (2, 3)).double()
    want = [reference_bits(7, "fader", 3, i, "flip", position) >> 40 for i in index for position in range(6)]
    assert torch.equal(got.flatten() * 2.0**24, torch.tensor(want).double())


def test_golden_values():
    """A change of these numbers changes every run ever made; it must not happen unnoticed."""
    assert key_of(0, "a", 1) == GOLDEN_KEY
    assert of([0, 1, 2]).uniform("flip").tolist() == GOLDEN_UNIFORM
    assert of([0, 1, 2]).integers("category", 5).tolist() == GOLDEN_INTEGERS
    assert of([0, 1, 2]).normal("noise").tolist() == pytest.approx(GOLDEN_NORMAL, rel=1e-5)


def test_numbers_follow_the_key_tensor_and_a_name_is_hashed_once(monkeypatch):
    """A step that keeps its inputs in place writes the next draw's key into the same tensor."""
    kept, other = of(torch.arange(9)), of(torch.arange(9), draw=4)
    want = other.normal("hashed once", (2,))
    monkeypatch.setattr("fader.draws.key_of", lambda *parts: pytest.fail(f"{parts} hashed again"))
    kept.key.copy_(other.key)
    assert torch.equal(kept.normal("hashed once", (2,)), want)


def test_uniforms_are_uniform():
    values = of(torch.arange(2000)).uniform("u", (50,)).flatten()
    assert 0 <= values.min() and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


def test_normals_are_normal():
    values = of(torch.arange(2000)).normal("n", (50,)).flatten()
    assert values.isfinite().all()
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    for moment, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        got = values.double().pow(moment).mean().item()
        assert abs(got - want) < 4.5 * math.sqrt(spread / len(values)), moment


def test_integers_are_uniform():
    counts = torch.bincount(of(torch.arange(70_000)).integers("k", 7), minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    with pytest.raises(ValueError, match="at least 1"):
        of([0]).integers("k", 0)


@pytest.mark.parametrize("change", ["seed", "stream", "draw", "name", "record", "position"])
def test_every_part_of_the_key_matters_and_correlates_with_nothing(change):
    index = torch.arange(20_000)
    base = of(index).uniform("u")
    other = {
        "seed": lambda: of(index, seed=8).uniform("u"),
        "stream": lambda: of(index, stream="other").uniform("u"),
        "draw": lambda: of(index, draw=4).uniform("u"),
        "name": lambda: of(index).uniform("v"),
        "record": lambda: of(index + 1).uniform("u"),
        "position": lambda: of(index).uniform("u", (2,))[:, 1],
    }[change]()
    assert (base == other).float().mean() < 1e-3
    correlation = torch.corrcoef(torch.stack([base, other]))[0, 1].item()
    assert abs(correlation) < 4.5 / math.sqrt(len(index))


def test_a_records_numbers_do_not_depend_on_its_company():
    """Any order, any subset, any share of a rank, and any order of asking give a record the same numbers."""
    whole = of(torch.arange(100))
    want = whole.normal("noise", (4,))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(of(order).normal("noise", (4,)), want[order])
    assert torch.equal(torch.cat([of(part).normal("noise", (4,)) for part in torch.arange(100).split(37)]), want)
    whole.uniform("something else")
    assert torch.equal(whole.normal("noise", (4,)), want)
    assert of([]).uniform("u", (3,)).shape == (0, 3)


def test_the_first_numbers_of_a_longer_draw_are_those_of_a_shorter():
    assert torch.equal(of([4, 9]).uniform("u", (5,))[:, :2], of([4, 9]).uniform("u", (2,)))
