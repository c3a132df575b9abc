"""A picture that does not decode while a run reads it is named and left out, and the next one stands in for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fader.draws import key_of
from pipeline.data.shards import ShardSet, Split
from pipeline.images import Preprocessing
from pipeline.loading.dali import open_loader
from pipeline.loading.plan import Plan, Request, sequential
from pipeline.loading.quarantine import Quarantine
from pipeline.models import checkpoint
from tests.damaged import BAD, damaged_set, grey, labels
from tests.warm import forked

SMALL = Preprocessing(32, crop="center")
KINDS = [("dali", "device"), ("dali", "host"), ("dali", "none"), ("pillow", "none")]
STANDING = np.arange(40)
STANDING[list(BAD)] = [13, 13, 31]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return damaged_set(tmp_path_factory.mktemp("damaged") / "set")


@pytest.fixture
def train(shards) -> Split:
    return shards.split("train")


def made(kind: tuple, split: Split, quarantine: Quarantine | None, **options):
    return open_loader(*kind, split, split.attributes, SMALL, seed=7, quarantine=quarantine, **options)


def requests(draws, batch_size: int = 6, **options) -> list[Request]:
    plan = Plan(40, seed=7)
    return [Request("a", draw, plan.rows("a", draw, batch_size), **options) for draw in draws]


def check(split: Split, batch, rows: np.ndarray) -> None:
    """A batch of these rows has the pictures and labels of what stands for them."""
    rows = STANDING[rows]
    assert batch.index.tolist() == rows.tolist()
    numbers = [int(key) for key in split.keys[rows]]
    found = batch.images.add(1).mul(127.5).mean((1, 2, 3))
    assert torch.allclose(found, torch.tensor([float(grey(number)) for number in numbers]), atol=1.5)
    assert batch.attributes.tolist() == [labels(number) for number in numbers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 6, 40])
def test_the_next_readable_record_stands_in(train, kind, batch_size, caplog):
    quarantine = Quarantine(train, 0.1)
    asked = requests(range(-(-80 // batch_size)), batch_size)
    for request, batch in zip(asked, made(kind, train, quarantine).batches(asked), strict=True):
        check(train, batch, request.rows)
    assert quarantine.keys == [str(train.keys[row]) for row in BAD]
    for row in BAD:
        (said,) = [record.message for record in caplog.records if f"{train.keys[row]} in " in record.message]
        assert train.shards[train.shard[row]].name in said and "does not decode" in said
        assert f"{train.keys[STANDING[row]]} stands in for it" in said or row == BAD[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_make_the_one_process_batch(train, kind, world_size):
    """Each finds out for itself, in its own time; together they read what one process reads."""
    asked = requests(range(12), flip=True)
    whole = list(made(kind, train, Quarantine(train, 0.1)).batches(asked))
    ranks = [
        list(made(kind, train, Quarantine(train, 0.1), rank=rank, world_size=world_size).batches(asked))
        for rank in range(world_size)
    ]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.attributes for part in parts]), batch.attributes)
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        assert sum((part.attributes >= 0).sum(0) for part in parts).tolist() == batch.known.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_known_before_changes_no_batch(train, kind):
    """A resumed run knows from its checkpoint what the unbroken one found on its way."""
    unbroken = list(made(kind, train, Quarantine(train, 0.1)).batches(requests(range(14), flip=True)))
    some = [str(train.keys[BAD[1]]), "of-another-split"]
    for keys in ([str(train.keys[row]) for row in BAD], some):
        quarantine = Quarantine(train, 0.1, keys)
        resumed = list(made(kind, train, quarantine).batches(requests(range(5, 14), flip=True)))
        for a, b in zip(unbroken[5:], resumed, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.attributes, b.attributes)
            assert torch.equal(a.index, b.index) and torch.equal(a.known, b.known)
    assert len(quarantine) == 3


def test_a_known_record_is_not_read_again(train, monkeypatch):
    quarantine = Quarantine(train, 0.1, [str(train.keys[row]) for row in BAD])
    read = Split.bytes
    monkeypatch.setattr(Split, "bytes", lambda self, row: read(self, row) if row not in BAD else pytest.fail("read"))
    for kind in (("dali", "none"), ("pillow", "none")):
        list(made(kind, train, quarantine).batches(requests(range(7))))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_alone_are_read_of_any_record(train, kind):
    asked = requests(range(7), images=False)
    for request, batch in zip(asked, made(kind, train, Quarantine(train, 0.1)).batches(asked), strict=True):
        assert batch.index.tolist() == request.rows.tolist()


def test_requests_without_pictures_keep_their_place_around_a_damaged_one(train):
    asked = [r for draw in range(7) for r in (*requests([draw]), *requests([draw], images=False))]
    for request, batch in zip(asked, made(("dali", "none"), train, Quarantine(train, 0.1)).batches(asked), strict=True):
        assert (batch.draws.host_key, batch.images is not None) == (key_of(7, request.stream, request.draw), request.images)
        if request.images:
            check(train, batch, request.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_the_share_that_may_go_is_an_error(train, kind, monkeypatch):
    monkeypatch.setattr("pipeline.loading.quarantine._FEW", 2)
    with pytest.raises(ValueError) as caught:
        list(made(kind, train, Quarantine(train, 0.05)).batches(sequential(40, 8)))
    said = str(caught.value)
    assert "3 of 40 records of train do not decode, and data.quarantine_share lets 2 go; the last is" in said
    assert "fader verify" in said and "\n" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_zero_lets_none_go(train, kind):
    with pytest.raises(ValueError, match=f"{train.keys[BAD[0]]} in .* does not decode: .*fader verify"):
        list(made(kind, train, Quarantine(train, 0.0)).batches(sequential(40, 8)))


def test_a_picture_that_only_dali_refuses_is_left_out_too(train):
    """Its size is another than the manifest says, so the crop lies outside."""
    quarantine = Quarantine(train, 0.1, [str(train.keys[row]) for row in BAD])
    loader = made(("dali", "none"), train, quarantine)
    loader.boxes[3] = [100, 100, 140, 140]
    (batch,) = loader.batches([Request("a", 0, np.arange(8))])
    assert batch.index.tolist() == [0, 1, 2, 4, 4, 5, 6, 7] and 3 in quarantine.rows


def test_the_last_record_is_followed_by_the_first(train):
    quarantine = Quarantine(train, 0.5, [str(train.keys[row]) for row in (38, 39, 0)])
    assert quarantine.readable(np.array([37, 38, 39, 0, 1])).tolist() == [37, 1, 1, 1, 1]


@pytest.mark.parametrize("share, size, most", [(0.001, 100_000, 100), (0.001, 500, 3), (0.0, 500, 0), (0.5, 2, 1)])
def test_how_many_may_go(train, share, size, most):
    split = Split(**{**vars(train), "keys": np.array([str(n) for n in range(size)])})
    assert Quarantine(split, share).most == most


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        folder = out / str(processes)
        folder.mkdir()
        forked("tests.damaged", shards.path, folder, processes=processes)
    return out


@pytest.mark.ranks
def test_both_ranks_end_with_the_same_weights(runs):
    first, second = (load_file(runs / "2" / f"unbroken-rank{rank}of2.safetensors") for rank in (0, 1))
    names = [name for name in first if name.startswith("w:")]
    assert names and all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.ranks
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one(runs, processes):
    for rank in range(processes):
        unbroken, resumed = (
            load_file(runs / str(processes) / f"{name}-rank{rank}of{processes}.safetensors")
            for name in ("unbroken", "resumed")
        )
        assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items() if name.startswith("w:"))
        assert torch.equal(unbroken["index"][16:], resumed["index"])


@pytest.mark.ranks
def test_two_ranks_read_what_one_process_reads_and_count_what_is_known_alike(runs):
    whole = load_file(runs / "1" / "unbroken-rank0of1.safetensors")
    first, second = (load_file(runs / "2" / f"unbroken-rank{rank}of2.safetensors") for rank in (0, 1))
    assert torch.equal(torch.cat([first["index"], second["index"]], 1), whole["index"])
    assert not set(whole["index"].flatten().tolist()) & set(BAD)
    assert torch.equal(first["known"], whole["known"]) and torch.equal(second["known"], whole["known"])


@pytest.mark.ranks
@pytest.mark.parametrize("processes", [1, 2])
def test_the_checkpoint_names_what_every_rank_left_out(runs, train, processes):
    found = checkpoint.latest(runs / str(processes) / "unbroken")
    assert checkpoint.read(found)[1]["quarantine"] == sorted(str(train.keys[row]) for row in BAD)
