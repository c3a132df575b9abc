"""Decoded pictures are kept where they fit, each is decoded once, and the ranks of a machine have one memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fader.attributes import Attribute, Attributes
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import Split, prepare
from pipeline.images import Preprocessing
from pipeline.loading import cache
from pipeline.loading.cache import choose, open_kept
from pipeline.loading.dali import open_loader
from pipeline.loading.plan import Plan, Request
from tests.pipeline.planted import NAMES, write_celeba

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ATTRIBUTES = Attributes([Attribute(name) for name in NAMES])
COUNT, BATCH = 70, 7


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Split:
    folder = tmp_path_factory.mktemp("set")
    return prepare(read_celeba(write_celeba(folder / "source", COUNT)), folder / "set", workers=1).split("train")


def loader(train: Split, kind: str, **options: Any):
    return open_loader("dali", kind, train, ATTRIBUTES, Preprocessing(32), **({"seed": 7, "threads": 1} | options))


def requests(train: Split, draws: range, streams: str = "ab", batch_size: int = BATCH) -> Iterator[Request]:
    plan = Plan(len(train), seed=7)
    for draw in draws:
        for stream in streams:
            yield Request(stream, draw, plan.rows(stream, draw, batch_size), flip=True)


@pytest.fixture
def read(monkeypatch) -> Counter:
    """How often the bytes of each row were asked for."""
    rows: Counter = Counter()
    original = Split.bytes
    monkeypatch.setattr(Split, "bytes", lambda self, row: (rows.update([row]), original(self, row))[1])
    return rows


# --- filling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "host"])
def test_every_record_is_decoded_once_while_batches_already_come(train, read, kind):
    steps = -(-len(train) // BATCH)
    batches = loader(train, kind, prefetch=2).batches(requests(train, range(3 * steps)))
    next(batches)
    assert sum(read.values()) <= 4 * BATCH, "it decoded more than the batches ahead before it gave one"
    for _ in range(2 * steps - 1):
        next(batches)
    assert read == Counter(range(len(train)))
    assert len(list(batches)) == 4 * steps and read == Counter(range(len(train))), "a record was decoded again"


@pytest.mark.parametrize("kind", ["device", "host"])
def test_batches_are_the_streamed_ones_to_the_bit_while_it_fills_and_after(train, kind):
    asked = list(requests(train, range(25)))
    streamed = list(loader(train, "none").batches(asked))
    keeping = loader(train, kind, prefetch=4)
    for _ in range(2):
        for a, b in zip(streamed, keeping.batches(asked), strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.attributes, b.attributes)


def test_what_was_decoded_before_an_iterator_was_closed_is_still_there(train, read):
    keeping = loader(train, "device", prefetch=3)
    batches = keeping.batches(requests(train, range(9), "a"))
    firsts = [next(batches) for _ in range(3)]
    batches.close()
    before = sum(read.values())
    again = list(keeping.batches(requests(train, range(3), "a")))
    assert sum(read.values()) == before
    assert all(torch.equal(a.images, b.images) for a, b in zip(firsts, again, strict=True))
    list(keeping.batches(requests(train, range(9), "a")))  # also what was on its way when it was closed


# --- where --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "ranks", "device", "expected"),
    [
        ({"cuda": 80, "cpu": 200}, 2, GPU, "device"),
        ({"cuda": 60, "cpu": 200}, 2, GPU, "host"),
        ({"cuda": 60, "cpu": 40}, 2, GPU, "none"),
        ({"cpu": 50}, 1, CPU, "device"),
        ({"cpu": 200}, 2, CPU, "host"),
        ({"cpu": 40}, 2, CPU, "none"),
        ({"cpu": 40}, 1, CPU, "none"),
    ],
)
def test_auto_takes_the_nearest_memory_that_leaves_room(monkeypatch, free, ranks, device, expected):
    monkeypatch.setattr(cache, "free_memory", lambda device: free[device.type] * 1e9)
    found, why = choose("auto", 32 * 10**9, device, lambda value: [value] * ranks)
    assert found == expected
    assert "32.0 GB" in why and f"{free['cpu']}.0 GB of the machine's memory are free" in why


def test_every_rank_of_a_machine_chooses_alike(monkeypatch):
    """The rank with the least room decides."""
    monkeypatch.setattr(cache, "free_memory", lambda device: {"cuda": 80e9, "cpu": 200e9}[device.type])
    assert choose("auto", 32 * 10**9, GPU, lambda value: [value, (30e9, 200e9)])[0] == "host"


def test_a_place_without_room_is_refused_at_once(monkeypatch, train):
    monkeypatch.setattr(cache, "free_memory", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"0.2 MB of decoded pictures do not fit: 0.1 MB .* set data.cache=auto"):
        loader(train, "device")
    with pytest.raises(ValueError, match="set data.cache=none"):
        loader(train, "host")
    assert loader(train, "auto").cache == loader(train, "none").cache == "none"
    monkeypatch.setattr(cache, "free_memory", lambda device: 150_000)
    with pytest.raises(ValueError, match="in 2 processes do not fit"):
        choose("device", 100_000, CPU, lambda value: [value] * 2)


def test_an_unknown_cache_and_one_for_pillow_are_refused(train):
    with pytest.raises(ValueError, match="unknown cache 'ram'"):
        loader(train, "ram")
    with pytest.raises(ValueError, match="pillow keeps nothing"):
        open_loader("pillow", "host", train, ATTRIBUTES, Preprocessing(32), seed=7)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_control_groups_count(tmp_path, version):
    """The narrowest of those that the process is in, and files in memory are no obstacle."""
    own, root = tmp_path / "cgroup", tmp_path / "groups"
    groups = {"": ("max", 9000, 0), "job": ("5000", 2500, 500), "job/step": ("9000", 100, 0)}
    names = ("memory.max", "memory.current", "inactive_file")
    own.write_text("0::/job/step\n")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own.write_text("5:cpu:/elsewhere\n4:memory:/job/step\n")
        groups[""] = (str(2**63 - 4096), 9000, 0)
    for place, (limit, used, inactive) in groups.items():
        folder = root / ("memory" if version == 1 else "") / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 1\n{names[2]} {inactive}\n")
    assert min(cache._group_limits(own, root)) == 3000
    assert min(cache._group_limits(tmp_path / "none", root)) == float("inf")


# --- one memory for several processes -------------------------------------------------------------------------------


class Ranks:
    """Forked processes of one machine, and what they tell each other."""

    def __init__(self, count: int, work: Callable[[int, cache.OnNode], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.results, self.barrier = context.Queue(), context.Barrier(count)
        self.board = context.Manager().list([None] * count)
        self.processes = [context.Process(target=self._run, args=(rank, work)) for rank in range(count)]
        for process in self.processes:
            process.start()

    def _run(self, rank: int, work: Callable) -> None:
        def on_node(value: Any) -> list[Any]:
            self.board[rank] = value
            self.barrier.wait(120)
            found = list(self.board)
            self.barrier.wait(120)
            return found

        try:
            self.results.put((rank, work(rank, on_node)))
        except ValueError as error:
            self.results.put((rank, error))

    def ends(self) -> list[Any]:
        found = dict(self.results.get(timeout=120) for _ in self.processes)
        for process in self.processes:
            process.join(120)
        return [found[rank] for rank in range(len(self.processes))]


SHAPE = (64, 64, 3)


def picture(row: int) -> np.ndarray:
    return np.full(SHAPE, row % 251 + 1, np.uint8)


def test_ranks_have_one_memory_and_never_see_half_a_record():
    size = 400

    def work(rank: int, on_node: cache.OnNode) -> int:
        kept = open_kept("host", size, SHAPE, CPU, on_node)
        nothing, torn, mine = np.zeros(size, bool), 0, range(rank, size, 2)
        for row in mine:
            kept.put(np.array([row]), torch.from_numpy(picture(row))[None])
            there = np.setdiff1d(np.arange(size), kept.missing(np.arange(size), nothing))
            newest = there[-8:]
            torn += sum(not np.array_equal(found, picture(n)) for n, found in zip(newest, kept.take(newest)))
        deadline = time.monotonic() + 60
        while kept.count < size and time.monotonic() < deadline:
            time.sleep(0.01)
        whole = kept.take(np.arange(size))
        return torn + sum(not np.array_equal(whole[row], picture(row)) for row in range(size))

    assert Ranks(2, work).ends() == [0, 0]


def test_nothing_is_left_behind_by_ranks_that_are_killed():

    def work(rank: int, on_node: cache.OnNode) -> list[str]:
        kept = open_kept("host", 10, SHAPE, CPU, on_node)
        on_node(None)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        kept.put(np.array([3]), torch.from_numpy(picture(3))[None])
        assert np.array_equal(kept.take(np.array([3]))[0], picture(3))
        return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]

    ranks = Ranks(2, work)
    rank, links = ranks.results.get(timeout=120)
    for process in ranks.processes:
        process.join(120)
    killed = [process.exitcode for process in ranks.processes]
    assert rank == 1 and killed == [-signal.SIGKILL, 0], "the second goes on although the first is gone"
    assert "(deleted)" in links and not [link for link in links if "fader" in link and "memfd" not in link]
    assert not [name for name in os.listdir("/dev/shm") if "fader" in name]


def test_a_memory_that_one_rank_cannot_open_is_an_error_on_all():
    def work(rank: int, on_node: cache.OnNode) -> None:
        def misled(value: Any) -> list[Any]:
            found = on_node(value)
            if rank == 1 and isinstance(value, str) and value.startswith("/proc"):
                return ["/proc/0/fd/0"]
            return found

        open_kept("host", 10, SHAPE, CPU, misled)

    first, second = Ranks(2, work).ends()
    assert isinstance(first, ValueError) and isinstance(second, ValueError)
    assert "cannot open the shared cache" in str(first) and str(first) == str(second)


def test_two_loaders_of_a_machine_decode_each_record_once(train):
    """What one decoded in the first epoch, the other gathers in those after."""

    def work(rank: int, on_node: cache.OnNode) -> tuple[list[int], list[np.ndarray]]:
        rows: list[int] = []
        original = Split.bytes
        Split.bytes = lambda self, row: (rows.append(row), original(self, row))[1]
        keeping = loader(train, "host", rank=rank, world_size=2, prefetch=1, on_node=on_node)
        images = []
        for epoch in range(3):  # of one iterator the last batches of an epoch would be on their way when the next begins
            for batch in keeping.batches(requests(train, range(5 * epoch, 5 * (epoch + 1)), "a", 10)):
                images.append(batch.images.numpy())
            on_node(None)
        return rows, images

    assert len(train) == 50

    (first, one), (second, other) = Ranks(2, work).ends()
    assert sorted(first + second) == list(range(len(train)))
    streamed = loader(train, "none").batches(requests(train, range(len(one)), "a", 10))
    for batch, parts in zip(streamed, zip(one, other, strict=True), strict=True):
        assert np.array_equal(batch.images.numpy(), np.concatenate(parts))
