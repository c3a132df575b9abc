"""Tars read front to back: each record once an epoch on any number of ranks, and what every loader gives of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fader.attributes import Attribute, Attributes
from pipeline.config import DataConfig, build
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import ShardSet, Split, prepare, upload
from pipeline.images import Preprocessing
from pipeline.loading.dali import open_loader, sequential
from pipeline.loading.dali.sequential import SequentialLoader
from pipeline.loading.plan import Request, TarPlan, share
from pipeline.models import checkpoint
from pipeline.training.run import train
from tests.pipeline.planted import NAMES, write_celeba

ATTRIBUTES = Attributes([Attribute(name) for name in NAMES])
TARS = np.repeat([0, 1, 2, 3, 4], [9, 9, 9, 9, 5])  # of 41 rows
RANKS = [1, 2, 3, 8]


def lines(plan: TarPlan, batch_size: int, batches: int, stream: str = "a") -> tuple[np.ndarray, np.ndarray]:
    """The rows of so many batches end to end, and the rank that reads each."""
    rows = [plan.rows(stream, draw, batch_size) for draw in range(batches)]
    ranks = [np.repeat(r, len(share(rows[0], r, plan.world_size))) for r in range(plan.world_size)]
    return np.concatenate(rows), np.tile(np.concatenate(ranks), batches)


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("batch_size", [1, 7, 41, 100])
def test_each_record_is_read_once_an_epoch(world_size, batch_size):
    rows, _ = lines(TarPlan(TARS, 7, world_size=world_size), batch_size, -(-41 * 20 // batch_size))
    for epoch in range(20):
        assert sorted(rows[41 * epoch : 41 * epoch + 41]) == list(range(41)), epoch


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("batch_size", [8, 10])
def test_each_rank_reads_its_tars_front_to_back(world_size, batch_size):
    """Within an epoch it leaves a row for the next one, but where a tar ends and another begins."""
    rows, ranks = lines(TarPlan(TARS, 7, world_size=world_size), batch_size, 41)
    epochs = np.arange(len(rows)) // 41
    begins = set(np.unique(TARS, return_index=True)[1].tolist())
    ends = {begin - 1 for begin in begins if begin} | {40}
    jumps = 0
    for epoch, rank in itertools.product(range(batch_size), range(world_size)):
        mine = rows[(epochs == epoch) & (ranks == rank)].tolist()
        for here, there in itertools.pairwise(mine):
            jumps += there != here + 1
            assert there == here + 1 or (here in ends and there in begins)
    assert 0 < jumps <= 4 * batch_size


def test_orders_differ_and_are_repeated():
    def order(epoch: int = 0, stream: str = "a", seed: int = 7, salt: int = 0) -> list[int]:
        return TarPlan(np.repeat(np.arange(20), 2), seed, salt).rows(stream, epoch, 40).tolist()

    orders = [order(), order(1), order(2), order(stream="b"), order(seed=8), order(salt=1)]
    assert len({tuple(rows) for rows in orders}) == len(orders)
    assert orders == [order(), order(1), order(2), order(stream="b"), order(seed=8), order(salt=1)]
    first = Counter(order(epoch)[0] // 2 for epoch in range(1000))
    assert all(15 < first[tar] < 85 for tar in range(20)), first  # 50 each, give or take five standard deviations


def test_what_cannot_be_read_front_to_back_is_refused():
    with pytest.raises(ValueError, match="over 0 records is empty"):
        TarPlan(TARS[:0], 7)
    with pytest.raises(ValueError, match="rows must stand tar after tar"):
        TarPlan(TARS[::-1], 7)
    with pytest.raises(ValueError, match="draw -1 with batch size 4"):
        TarPlan(TARS, 7).rows("a", -1, 4)


@pytest.mark.parametrize(
    "key, value",
    [("window", 2), ("replacement", True), ("balance", {"Male": 0.5}), ("cache", "device"), ("cache", "host")],
)
def test_settings_against_it_are_refused(key, value):
    with pytest.raises(ValueError, match=f"against {key}: leave that out, or use loader dali"):
        DataConfig(path="set", attributes=("*",), loader="sequential", **{key: value})
    DataConfig(path="set", attributes=("*",), loader="sequential", cache="none")


# --- the pictures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sequential")
    prepare(read_celeba(write_celeba(folder / "source", 60)), folder / "set", shard_records=10, workers=1)
    return folder / "set"


@pytest.fixture
def pictures(folder) -> Split:
    return ShardSet.open(folder).split("train")


def made(kind: str, split: Split, **options):
    return open_loader(kind, "none", split, ATTRIBUTES, Preprocessing(32), **({"seed": 7, "threads": 1} | options))


def requests(split: Split, world_size: int, batch_size: int = 7, batches: int = 14) -> list[Request]:
    """Two epochs and more of two streams, as two phases read them, and a third that reads labels."""
    plan = TarPlan(split.shard, 7, world_size=world_size)
    streams = {"a": True, "b": True, "c": False}
    return [
        Request(stream, draw, plan.rows(stream, draw, batch_size), images=images, flip=True)
        for draw in range(batches)
        for stream, images in streams.items()
    ]


def check_equal(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.attributes, b.attributes)
        assert torch.equal(a.known, b.known) and (a.size, a.draws.host_key) == (b.size, b.draws.host_key)
        assert (a.images is None) == (b.images is None) and (a.images is None or torch.equal(a.images, b.images))


@pytest.mark.parametrize("records", [9, 32_768])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_are_those_of_the_planned_loader(pictures, world_size, records, monkeypatch):
    """Bit for bit, on each rank; a few readers read it all, and nothing else opens a tar."""
    monkeypatch.setattr(sequential, "_RECORDS", records)
    asked = requests(pictures, world_size)
    opened: list[int] = []
    opening = SequentialLoader._open
    monkeypatch.setattr(
        SequentialLoader, "_open", lambda self, parts: (opened.append(len(parts)), opening(self, parts))[1]
    )
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size}
        expected = list(made("dali", pictures, **options).batches(asked))
        opened.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Split, "bytes", lambda *_: pytest.fail("read at random"))
            check_equal(made("sequential", pictures, **options).batches(asked), expected)
        assert sum(opened) == 28 and (len(opened) == 2 if records > 1000 else len(opened) > 6)


def test_two_ranks_read_each_record_once_an_epoch(pictures):
    """What the ranks give, put together in the order of batches."""
    asked = [request for request in requests(pictures, 2) if request.stream == "a"]
    ranks = [made("sequential", pictures, rank=rank, world_size=2).batches(asked) for rank in range(2)]
    rows = torch.cat([batch.index for pair in zip(*ranks, strict=True) for batch in pair]).tolist()
    size = len(pictures)
    assert len(rows) >= 2 * size
    first, second = rows[:size], rows[size : 2 * size]
    assert sorted(first) == sorted(second) == list(range(size)) and first != second


def test_it_may_begin_anywhere(pictures):
    """As a resumed run does: the batches from there on are those of the unbroken one."""
    asked = requests(pictures, 1)
    whole = list(made("sequential", pictures).batches(asked))
    check_equal(made("sequential", pictures).batches(asked[20:]), whole[20:])


def test_a_set_that_lies_elsewhere_is_fetched_as_it_is_read(folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "cache"))
    upload(folder, "memory://sequential/set")
    elsewhere = ShardSet.open("memory://sequential/set").split("train")
    fetched = list((tmp_path / "cache").rglob("train-*.tar"))
    batches = made("sequential", elsewhere).batches(requests(elsewhere, 1))
    first = next(batches)
    check_equal([first, *batches], made("dali", pictures).batches(requests(pictures, 1)))
    assert not fetched and len(list((tmp_path / "cache").rglob("train-*.tar"))) == 5


def test_a_tar_that_is_gone_is_named(pictures):
    split = dataclasses.replace(pictures, shards=[*pictures.shards[:-1], Path("gone.tar")])
    with pytest.raises(FileNotFoundError, match="gone.tar"):
        list(made("sequential", split).batches(requests(split, 1)))


def test_what_waits_is_bounded(pictures, monkeypatch):
    """A stream that ends must not have all that follows it read ahead."""
    monkeypatch.setattr(sequential, "_REQUESTS", 10)
    taken = 0

    def asked():
        nonlocal taken
        for request in [Request("end", 0, np.arange(4)), *requests(pictures, 1, batches=200)]:
            taken += 1
            yield request

    batches = made("sequential", pictures).batches(asked())
    next(batches)
    assert taken == 11
    batches.close()


def test_it_keeps_nothing_and_says_what_it_does(pictures, caplog):
    caplog.set_level(logging.INFO)
    made("sequential", pictures)
    assert "in 5 tars at 32 pixels, read front to back by DALI on cpu (1 threads a stream, 3 batches" in caplog.text
    with pytest.raises(ValueError, match="data.cache is 'host', and the loader sequential keeps nothing"):
        open_loader("sequential", "host", pictures, ATTRIBUTES, Preprocessing(32), seed=7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_batches_are_those_of_the_planned_loader(pictures):
    asked, device = requests(pictures, 1), torch.device("cuda")
    expected = made("dali", pictures, device=device).batches(asked)
    check_equal(made("sequential", pictures, device=device).batches(asked), expected)


# --- a run ----------------------------------------------------------------------------------------------------------


def run(data: Path, folder: Path, images: int, **options) -> dict[str, torch.Tensor]:
    """The weights of a run of a discriminator and an autoencoder, which read a stream each."""
    method = {"name": "fader", "preset": "small", "init_channels": 4, "max_channels": 8, "num_layers": 3}
    tree = {
        "name": "sequential",
        "method": {**method, "latent": {"hidden_channels": 8, "ramp_images": 100}, "images": images},
        "data": {"path": str(data), "attributes": ["Odd"], "image_size": 16, "loader": "sequential", "threads": 1},
        "batch_size": 8,
        "run": {"log_images": 16, "checkpoint_images": 48, "picture_images": 0},
        "tracking": {"enabled": False},
    }
    train(build(tree, "test"), folder, **options)
    (state,) = [path for path in checkpoint.kept(folder) if checkpoint.images_of(path) == images]
    return load_file(next(state.glob("networks*.safetensors")))


def test_a_resumed_run_ends_as_the_unbroken_one(folder, tmp_path, caplog):
    unbroken = run(folder, tmp_path / "unbroken", 96)
    run(folder, tmp_path / "resumed", 48)
    resumed = run(folder, tmp_path / "resumed", 96, resume=True)
    other = run(folder, tmp_path / "other", 48)
    assert unbroken and all(torch.equal(value, resumed[name]) for name, value in unbroken.items())
    assert any(not torch.equal(value, unbroken[name]) for name, value in other.items())
    assert "data.loader sequential" not in caplog.text
    card = json.loads((tmp_path / "other" / "run.json").read_text())
    (tmp_path / "other" / "run.json").write_text(json.dumps(card | {"world_size": 2}))
    run(folder, tmp_path / "other", 96, resume=True)
    assert "data.loader sequential: the run was on 2 ranks and goes on with 1" in caplog.text
