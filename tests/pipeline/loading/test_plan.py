"""The plan reads what it promises to read, and a Batch belongs to its records."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats

from fader.draws import Draws
from pipeline.loading.loader import finish
from pipeline.loading.plan import Plan, Request, sequential, share

SHARDS = np.repeat(np.arange(10), [5, 5, 5, 5, 5, 5, 5, 5, 5, 3])


def positions(plan: Plan, stream: str, batch_size: int, stop: int) -> np.ndarray:
    """The first `stop` positions of a stream, read in batches."""
    draws = range(-(-stop // batch_size))
    return np.concatenate([plan.rows(stream, draw, batch_size) for draw in draws])[:stop]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 48, 100])
@pytest.mark.parametrize("window", [None, 1, 3, 10])
def test_each_record_is_read_once_an_epoch(batch_size, window):
    plan = Plan(48, seed=3, window=window, shard_of=SHARDS)
    for epoch in positions(plan, "a", batch_size, 5 * 48).reshape(5, 48):
        assert sorted(epoch) == list(range(48))


def test_the_stream_does_not_depend_on_the_batch_size():
    plan = Plan(48, seed=3)
    whole = positions(plan, "a", 1, 240)
    for batch_size in (5, 48, 120, 239):
        assert np.array_equal(positions(plan, "a", batch_size, 240), whole)


def test_any_draw_is_the_same_in_a_new_plan_asked_in_any_order():
    plan = Plan(48, seed=3, salt=1)
    unbroken = [plan.rows("a", draw, 7) for draw in range(100)]
    for draw in (99, 0, 50, 3):
        assert np.array_equal(Plan(48, seed=3, salt=1).rows("a", draw, 7), unbroken[draw])
    for draw in reversed(range(100)):  # longer than the plan remembers
        assert np.array_equal(plan.rows("a", draw, 7), unbroken[draw])


def test_the_order_is_pinned():
    """Numbers of today: a run saved now resumes with these, so a change here breaks every checkpoint."""
    assert Plan(8, seed=1).rows("encoder+decoder", 0, 8).tolist() == [1, 2, 5, 3, 6, 7, 4, 0]
    assert Plan(8, seed=1, replacement=True).rows("encoder+decoder", 0, 8).tolist() == [0, 4, 1, 6, 7, 6, 2, 7]


def test_seed_salt_stream_and_epoch_give_independent_orders():
    n = 2000
    first = Plan(n, seed=1).rows("a", 0, n)
    others = {
        "seed": Plan(n, seed=2).rows("a", 0, n),
        "salt": Plan(n, seed=1, salt=1).rows("a", 0, n),
        "stream": Plan(n, seed=1).rows("b", 0, n),
        "epoch": Plan(n, seed=1).rows("a", 1, n),
    }
    for name, other in others.items():
        equal = int((first == other).sum())  # Poisson(1) if independent
        assert equal <= 8, (name, equal)
        assert stats.spearmanr(first, other).pvalue > 1e-4, name


@pytest.mark.parametrize("options", [{}, {"replacement": True}, {"window": 4, "shard_of": np.arange(60) // 15}])
def test_every_row_comes_to_every_position_alike(options):
    """Chi-square over 6,000 epochs of 60 rows: a window over all four shards is a full shuffle too."""
    plan, size, epochs = Plan(60, seed=5, **options), 60, 6000
    orders = positions(plan, "a", size, size * epochs).reshape(epochs, size)
    counts = np.zeros((size, size))
    np.add.at(counts, (np.arange(size)[None].repeat(epochs, 0), orders), 1)
    statistic = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    free = size * (size - 1) if options.get("replacement") else (size - 1) ** 2
    scale = 1 if options.get("replacement") else (size - 1) / size  # each table is a permutation matrix: less spread
    assert 1e-4 < stats.chi2.sf(statistic * scale, free) < 1 - 1e-4


WEIGHTS = np.linspace(0.25, 1.75, 60)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 2, "shard_of": np.arange(60) // 15},
        {"replacement": True},
        {"weights": WEIGHTS},
        {"weights": WEIGHTS, "window": 2, "shard_of": np.arange(60) // 15},
        {"weights": WEIGHTS, "replacement": True},
    ],
    ids=["full", "window", "replacement", "weights", "weights and window", "weights and replacement"],
)
def test_no_rank_is_given_other_records_than_the_next(options):
    """Chi-square of which of four ranks reads which record, over 2,800 epochs; their shares are uneven: 1, 2, 2, 2.

    Seven does not divide sixty, so an epoch begins anywhere in a batch: a rank's place in it says nothing.
    """
    plan, epochs = Plan(60, seed=11, **options), 2800
    batches = np.stack([plan.rows("a", draw, 7) for draw in range(60 * epochs // 7)])
    table = [np.bincount(share(batches.T, rank, 4).ravel(), minlength=60) for rank in range(4)]
    assert stats.chi2_contingency(np.array(table)).pvalue > 1e-4
    assert [row.sum() for row in table] == [len(batches) * size for size in (1, 2, 2, 2)]
    weights = options.get("weights", np.ones(60))
    assert np.abs(np.sum(table, axis=0) / epochs - weights).max() < 5 * np.sqrt(weights.max() / epochs)


def test_every_order_of_four_records_is_as_likely():
    plan, epochs = Plan(4, seed=9), 12000
    orders = positions(plan, "a", 4, 4 * epochs).reshape(epochs, 4)
    counts = [int((orders == order).all(1).sum()) for order in permutations(range(4))]
    assert sum(counts) == epochs
    assert stats.chisquare(counts).pvalue > 1e-4


def test_with_replacement_repeats_as_chance_does():
    plan, n = Plan(1000, seed=2, replacement=True), 1000
    unseen = [1000 - len(np.unique(plan.rows("a", draw, n))) for draw in range(40)]
    assert np.mean(unseen) == pytest.approx(1000 * (1 - 1 / 1000) ** n, abs=4 * 9.7 / 40**0.5)
    assert np.array_equal(plan.rows("a", 3, 10), Plan(1000, seed=2, replacement=True).rows("a", 3, 10))
    rows = positions(plan, "a", 7, 20000)
    assert stats.chisquare(np.bincount(rows, minlength=1000)).pvalue > 1e-4
    pairs = np.zeros((10, 10))
    np.add.at(pairs, (rows[:-1] // 100, rows[1:] // 100), 1)
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def test_a_window_reads_its_shards_together_and_mixes_them():
    shard_of = np.arange(50) % 10
    plan = Plan(50, seed=3, window=3, shard_of=shard_of)
    firsts, changes = np.zeros(10), []
    for epoch in range(2000):
        rows = plan.rows("a", epoch, 50)
        firsts[shard_of[rows[0]]] += 1
        windows = np.split(shard_of[rows], [15, 30, 45])
        assert [len(set(window)) for window in windows] == [3, 3, 3, 1]
        changes.append((windows[0][1:] != windows[0][:-1]).sum())
    assert stats.chisquare(firsts).pvalue > 1e-4
    assert np.mean(changes) == pytest.approx(14 * 10 / 14, abs=0.2)  # the next record is of another shard: 10 of 14


def test_a_window_with_replacement_is_refused():
    with pytest.raises(ValueError, match="replacement"):
        Plan(5, 0, window=2, shard_of=np.zeros(5), replacement=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 40])
def test_shares_of_all_ranks_are_the_global_batch(world_size):
    rows = Plan(48, seed=3).rows("a", 2, 32)
    shares = [share(rows, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), rows)
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(share(torch.from_numpy(rows), world_size - 1, world_size), torch.from_numpy(shares[-1]))


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        share(np.arange(4), 2, 2)


def test_sequential_reads_each_row_once_and_in_order():
    requests = list(sequential(10, 4))
    assert [request.rows.tolist() for request in requests] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [request.draw for request in requests] == [0, 1, 2]
    assert not any(request.flip for request in requests) and all(request.images for request in requests)
    with pytest.raises(ValueError, match="batch size is 0"):
        list(sequential(10, 0))


def made(request: Request, pixels: torch.Tensor, labels: torch.Tensor, rank: int = 0, world_size: int = 1):
    rows = torch.from_numpy(request.rows)
    part = pixels.index_select(0, share(rows, rank, world_size))
    return finish(request, part, labels, rows, seed=7, rank=rank, world_size=world_size)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([[row % 2, row % 3 - 1] for row in range(20)], dtype=torch.float32)  # the second is often unknown


def test_a_batch_belongs_to_its_records(pixels):
    request = Request("a", 4, np.array([3, 3, 19, 0]), flip=False)
    batch = made(request, pixels, LABELS)
    assert batch.index.tolist() == [3, 3, 19, 0] and batch.size == 4
    assert torch.equal(batch.attributes, LABELS[[3, 3, 19, 0]])
    assert batch.known.tolist() == [4, 1]
    assert torch.equal(batch.images, pixels[[3, 3, 19, 0]].permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_half_of_the_records_are_mirrored_by_their_own_draw(pixels):
    request = Request("a", 4, np.arange(20).repeat(20), flip=True)
    batch, plain = made(request, pixels, LABELS), made(Request("a", 4, request.rows), pixels, LABELS)
    mirrored = Draws.of(7, "a", 4, batch.index).uniform("flip") < 0.5
    assert torch.equal(batch.images[mirrored], plain.images[mirrored].flip(3))
    assert torch.equal(batch.images[~mirrored], plain.images[~mirrored])
    sides = [
        float((Draws.of(7, "a", draw, torch.arange(100)).uniform("flip") < 0.5).float().mean()) for draw in range(100)
    ]
    assert stats.binomtest(round(sum(sides) * 100), 10000).pvalue > 1e-4


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_make_the_one_process_batch(pixels, world_size):
    request = Request("a", 4, Plan(20, 3).rows("a", 4, 8), flip=True)
    whole = made(request, pixels, LABELS)
    parts = [made(request, pixels, LABELS, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.attributes for part in parts]), whole.attributes)
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
    noise = torch.cat([part.draws.normal("noise", (3,)) for part in parts])
    assert torch.equal(noise, whole.draws.normal("noise", (3,)))
    for part in parts:
        assert part.size == 8 / world_size
        assert torch.allclose(part.known, whole.known / world_size)
    values = torch.arange(8.0)
    means = [part.mean(share(values, rank, world_size)) for rank, part in enumerate(parts)]
    assert torch.isclose(torch.stack(means).mean(), whole.mean(values))


def test_a_request_without_images_gives_none(pixels):
    request = Request("a", 0, np.array([1, 2]), images=False)
    rows = torch.from_numpy(request.rows)
    batch = finish(request, None, LABELS, rows, seed=7, rank=0, world_size=1)
    assert batch.images is None and torch.equal(batch.attributes, LABELS[[1, 2]])
