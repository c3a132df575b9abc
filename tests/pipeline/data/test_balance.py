"""Sampling weights meet their targets, and a run that asks for them draws so."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy import stats

from fader.attributes import Attribute, Attributes
from pipeline.data.balance import balanced_weights
from pipeline.data.shards import Split
from pipeline.loading.plan import Plan, share

HAIR = Attribute("Hair", "k-way", ("black", "brown", "blond", "grey"))
ATTRIBUTES = Attributes([Attribute("Male"), Attribute("Glasses"), HAIR, Attribute("Age", "continuous")])


def split_of(labels: np.ndarray, attributes: Attributes) -> Split:
    """A split of these labels [n, A], without pictures."""
    n = len(labels)
    keys, none = np.array([f"{row:06d}" for row in range(n)]), np.zeros(n, np.int64)
    return Split("train", attributes, keys, labels, none, none, none, none, none, [], "")


def labels_of(size: int = 6000, seed: int = 0, unknown: float = 0.1) -> np.ndarray:
    """Glasses are rare and hang together with Male; a tenth of the labels is unknown."""
    rng = np.random.default_rng(seed)
    male = rng.random(size) < 0.4
    glasses = rng.random(size) < np.where(male, 0.12, 0.03)
    hair = rng.choice(4, size, p=[0.5, 0.3, 0.15, 0.05])
    labels = np.stack([male, glasses, hair, rng.random(size)], 1).astype(np.float32)
    labels[:, :3][rng.random((size, 3)) < unknown] = -1
    return labels


def share_of(labels: np.ndarray, weights: np.ndarray, value: int = 1) -> float:
    known = labels >= 0
    return float(weights[known & (labels == value)].sum() / weights[known].sum())


def test_one_share_by_hand():
    """2 of 8 known are present: to be half they weigh 2, the 6 others 2/3, the two unknown 1."""
    labels = np.array([1, 1, 0, 0, 0, 0, 0, 0, -1, -1], np.float32)[:, None]
    weights, groups = balanced_weights(split_of(labels, Attributes([Attribute("Glasses")])), {"Glasses": 0.5})
    assert np.allclose(weights, [2, 2, *[2 / 3] * 6, 1, 1], rtol=1e-6)
    assert len(set(groups)) == 3 and len(set(groups[:2])) == len(set(groups[2:8])) == len(set(groups[8:])) == 1


def test_several_attributes_meet_their_shares_at_once():
    labels = labels_of()
    shares = {"Glasses": 0.3, "Male": 0.5, "Hair": {"grey": 0.25, "black": 0.25}}
    weights, _ = balanced_weights(split_of(labels, ATTRIBUTES), shares)
    assert weights.mean() == pytest.approx(1, abs=1e-9) and weights.min() > 0
    assert share_of(labels[:, 1], weights) == pytest.approx(0.3, abs=2e-6)
    assert share_of(labels[:, 0], weights) == pytest.approx(0.5, abs=2e-6)
    assert share_of(labels[:, 2], weights, 3) == pytest.approx(0.25, abs=2e-6)
    assert share_of(labels[:, 2], weights, 0) == pytest.approx(0.25, abs=2e-6)
    others = [share_of(labels[:, 2], weights, value) for value in (1, 2)]
    natural = [share_of(labels[:, 2], np.ones(6000), value) for value in (1, 2)]
    assert sum(others) == pytest.approx(0.5, abs=4e-6)
    assert others[0] / others[1] == pytest.approx(natural[0] / natural[1], rel=0.2)  # Hair hangs on nothing else


def test_raking_leaves_how_attributes_hang_together_as_it_was():
    """The odds ratio of Male and Glasses is what raking keeps: Deming and Stephan 1940."""
    labels = labels_of(unknown=0)
    weights, _ = balanced_weights(split_of(labels, ATTRIBUTES), {"Glasses": 0.3, "Male": 0.5})

    def odds(w: np.ndarray) -> float:
        cell = [[w[(labels[:, 0] == m) & (labels[:, 1] == g)].sum() for g in (0, 1)] for m in (0, 1)]
        return cell[0][0] * cell[1][1] / (cell[0][1] * cell[1][0])

    assert odds(weights) == pytest.approx(odds(np.ones(6000)), rel=1e-6)


def test_a_value_may_be_named_by_its_number():
    labels = labels_of()
    split = split_of(labels, ATTRIBUTES)
    by_name, by_number = ({"Hair": {"blond": 0.3}}, {"Hair": {"2": 0.3}})
    assert np.array_equal(balanced_weights(split, by_name)[0], balanced_weights(split, by_number)[0])
    both = balanced_weights(split, {"Male": {"1": 0.3}})[0]
    assert np.allclose(both, balanced_weights(split, {"Male": 0.3})[0])


@pytest.mark.parametrize(
    "shares, message",
    [
        ({"Glases": 0.3}, "did you mean 'Glasses'"),
        ({"Age": 0.3}, "Age is continuous"),
        ({"Hair": 0.3}, "Hair has 4 values; say whose share 0.3 is, as Hair: {black: 0.3}"),
        ({"Hair": {"red": 0.3}}, "no value 'red'; it has black, brown, blond, grey"),
        ({"Hair": {"black": 0.3, "0": 0.3}}, "two shares"),
        ({"Hair": {"black": 0.7, "grey": 0.3}}, "leave nothing to its other values"),
        ({"Hair": {"black": 0.3, "brown": 0.3, "blond": 0.3, "grey": 0.3}}, "sum to 1.2, not to 1"),
        ({"Male": 1.0}, "asks for 1; a share lies between 0 and 1"),
        ({"Male": 0.0}, "asks for 0; "),
        ({"Male": 30.0}, "asks for 30; "),
    ],
)
def test_shares_that_mean_nothing_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        balanced_weights(split_of(labels_of(), ATTRIBUTES), shares)


def test_a_share_of_what_the_split_lacks_is_refused():
    labels = labels_of(100)
    labels[labels[:, 1] == 1, 1] = 0
    with pytest.raises(ValueError, match="no record of train is known to have Glasses = 1, so its share cannot be 0.3"):
        balanced_weights(split_of(labels, ATTRIBUTES), {"Glasses": 0.3})


def test_shares_that_no_weights_meet_together_are_refused():
    """Every record with glasses is male: 30% with glasses and 20% male cannot be."""
    labels = labels_of(unknown=0)
    labels[labels[:, 1] == 1, 0] = 1
    with pytest.raises(ValueError, match="no weights of train meet all targets at once: .* hang together"):
        balanced_weights(split_of(labels, ATTRIBUTES), {"Glasses": 0.3, "Male": 0.2})
    balanced_weights(split_of(labels, ATTRIBUTES), {"Glasses": 0.3, "Male": 0.4})


def test_what_is_asked_and_what_it_costs_is_said(caplog):
    caplog.set_level(logging.INFO)
    labels = labels_of()
    weights, _ = balanced_weights(split_of(labels, ATTRIBUTES), {"Glasses": 0.3})
    assert "Glasses = 1 6." in caplog.text and "-> 30.0%" in caplog.text
    assert f"{weights.min():.2f} to {weights.max():.2f} times" in caplog.text and "by heart" not in caplog.text
    labels[10:, 1] = 0
    labels[:10, 1] = 1
    balanced_weights(split_of(labels, ATTRIBUTES), {"Glasses": 0.3})
    assert "learnt by heart" in caplog.text


# --- what a plan draws of them ----------------------------------------------------------------------------------------

SHARES = {"Glasses": 0.3, "Hair": {"grey": 0.2}}
SHARD_OF = np.arange(6000) // 500


def balanced_plan(seed: int = 5, **options) -> tuple[Plan, np.ndarray, np.ndarray]:
    labels = labels_of()
    weights, groups = balanced_weights(split_of(labels, ATTRIBUTES), SHARES)
    return Plan(6000, seed, weights=weights, groups=groups, **options), labels, weights


@pytest.mark.parametrize("options", [{}, {"window": 3, "shard_of": SHARD_OF}])
def test_an_epoch_has_each_record_its_weight_rounded_down_or_up(options):
    plan, labels, weights = balanced_plan(**options)
    for epoch in range(4):
        rows = plan.rows("a", epoch, 6000)
        times = np.bincount(rows, minlength=6000)
        assert ((times == np.floor(weights)) | (times == np.ceil(weights))).all()
        drawn = labels[rows]
        known = int((drawn[:, 1] >= 0).sum())
        assert abs(int((drawn[:, 1] == 1).sum()) - 0.3 * known) <= 10  # exact to one record a group
        assert abs((drawn[:, 1] < 0).mean() - (labels[:, 1] < 0).mean()) < 0.01


def test_over_epochs_every_record_comes_by_its_weight():
    """Chi-square of the records' counts over 300 epochs: each epoch rounds w up with probability w - floor(w)."""
    plan, _, weights = balanced_plan()
    epochs = 300
    times = np.bincount(np.concatenate([plan.rows("a", epoch, 6000) for epoch in range(epochs)]), minlength=6000)
    up = weights - np.floor(weights)
    random = up > 0.02
    z = (times - epochs * weights)[random] / np.sqrt(epochs * up * (1 - up))[random]
    assert 1e-4 < stats.chi2.sf((z**2).sum(), len(z)) < 1 - 1e-4
    assert np.abs(z).max() < 5.5


def test_a_batch_anywhere_in_an_epoch_has_the_shares_asked_for():
    plan, labels, _ = balanced_plan()
    drawn = np.stack([labels[plan.rows("a", draw, 60), 1] for draw in range(500)])  # five epochs
    parts = [drawn[place::100] for place in range(100)]
    table = np.array([[int((part == value).sum()) for part in parts] for value in (0, 1)])
    assert stats.chi2_contingency(table).pvalue > 1e-4
    present, known = int((drawn == 1).sum()), int((drawn >= 0).sum())
    assert stats.binomtest(present, known, 0.3).pvalue > 1e-4
    spread = (drawn == 1).sum(1).var() / (60 * 0.27 * 0.73)
    assert 0.75 < spread < 1.25, "batches spread as chance does"


def test_independent_draws_follow_the_weights():
    plan, labels, weights = balanced_plan(replacement=True)
    rows = np.concatenate([plan.rows("a", epoch, 6000) for epoch in range(50)])
    assert stats.chisquare(np.bincount(rows, minlength=6000), 50 * weights * (6000 / weights.sum())).pvalue > 1e-4
    drawn = labels[rows, 1]
    assert stats.binomtest(int((drawn == 1).sum()), int((drawn >= 0).sum()), 0.3).pvalue > 1e-4
    rare = (drawn == 1).astype(int)
    assert stats.chi2_contingency(np.histogram2d(rare[:-1], rare[1:], 2)[0]).pvalue > 1e-4


@pytest.mark.parametrize("options", [{}, {"window": 3, "shard_of": SHARD_OF}, {"replacement": True}])
def test_weighted_draws_are_a_function_of_their_key_alone(options):
    """Any draw, from a new plan; any batch size; any number of ranks."""
    plan = balanced_plan(**options)[0]
    line = np.concatenate([plan.rows("a", draw, 32) for draw in range(500)])
    again = balanced_plan(**options)[0]
    assert np.array_equal(again.rows("a", 301, 32), line[301 * 32 : 302 * 32])
    assert np.array_equal(np.concatenate([again.rows("a", draw, 50) for draw in range(320)]), line)
    for world_size in (2, 3, 5):
        parts = [share(plan.rows("a", 7, 32), rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), line[7 * 32 : 8 * 32])
    assert not np.array_equal(balanced_plan(seed=6, **options)[0].rows("a", 0, 32), line[:32])
    assert not np.array_equal(plan.rows("b", 0, 32), line[:32])


def test_the_weighted_order_is_pinned():
    """Numbers of today: a run saved now resumes with these."""
    weights, groups = np.array([2.5, 0.5, 0.5, 0.5]), np.array([1, 0, 0, 0])
    assert Plan(4, 1, weights=weights, groups=groups).rows("a", 0, 8).tolist() == [0, 0, 2, 0, 0, 1, 0, 0]
    assert Plan(4, 1, weights=weights, replacement=True).rows("a", 0, 8).tolist() == [1, 3, 2, 0, 0, 1, 2, 0]


def test_a_weight_of_zero_is_never_drawn():
    weights = np.array([0.0, 1, 3, 0])
    for options in ({}, {"replacement": True}):
        rows = np.concatenate([Plan(4, 3, weights=weights, **options).rows("a", draw, 4) for draw in range(500)])
        assert set(rows) == {1, 2}


