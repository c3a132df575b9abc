"""Shard sets behind a web server that fails: what arrives is whole, and the cache keeps to its limit."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from fader.method import Batch
from pipeline.data import remote
from pipeline.data.datasets import source
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import ShardSet, Split, prepare, upload, verify
from pipeline.images import Preprocessing
from pipeline.loading.dali import open_loader
from pipeline.loading.plan import Plan, Request
from tests.pipeline.planted import write_celeba

pytest.importorskip("aiohttp", reason="fsspec reads https through aiohttp")
COUNT = 60


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("local")
    return prepare(read_celeba(write_celeba(folder / "source", COUNT)), folder / "set", shard_records=8, workers=1)


class Server(ThreadingHTTPServer):
    """Serves files with Range; every third answer to a Range is 503, every fifth breaks off in the middle."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.count, self.faults, self.failing, self.ranges = folder, 0, 0, True, True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *words: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, span = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = span if self.server.ranges else None
        part = data[int(span[1]) : int(span[2]) + 1] if span else data
        self.server.count += bool(span)
        fault = span is not None and self.server.failing
        if fault and self.server.count % 3 == 0:
            self.server.faults += 1
            self.send_error(503)
            return
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            broken = fault and self.server.count % 5 == 0
            self.server.faults += broken
            self.wfile.write(part[: len(part) // 2] if broken else part)
        self.close_connection = True


@pytest.fixture
def server(local, tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote, "PART_BYTES", 20_000)
    server = Server(local.path)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_every_byte_arrives_through_a_server_that_drops_and_refuses(server, local):
    found = ShardSet.open(address(server))
    assert found.digest == local.digest and not list(found.path.glob("*.tar"))
    for name in ("train", "valid", "test"):
        split, expected = found.split(name), local.split(name)
        for row in range(len(split)):
            assert np.array_equal(split.bytes(row), expected.bytes(row)) and split.keys[row] == expected.keys[row]
    assert server.faults > 5
    assert verify(found.path, workers=1).records == COUNT
    count = server.count
    again = ShardSet.open(address(server)).split("train")
    assert np.array_equal(again.bytes(0), local.split("train").bytes(0)) and server.count == count, "it was kept"


def test_the_cache_keeps_to_its_limit_and_views_stay_readable(server, local, monkeypatch):
    limit = 3 * max(path.stat().st_size for path in local.path.glob("train-*.tar"))
    monkeypatch.setenv("FADER_CACHE_GB", str(limit / 1e9))
    server.failing = False
    split, expected = ShardSet.open(address(server)).split("train"), local.split("train")
    views = []
    for row in range(len(split)):
        views.append(split.bytes(row))
        assert sum(path.stat().st_size for path in split.shards[0].parent.glob("*.tar")) <= limit
    assert all(np.array_equal(view, expected.bytes(row)) for row, view in enumerate(views))
    monkeypatch.setenv("FADER_CACHE_GB", "much")
    with pytest.raises(ValueError, match="FADER_CACHE_GB"):
        ShardSet.open(address(server)).split("train")._mapped(0)


def test_what_is_wrong_over_there_is_named(server, local, tmp_path):
    with pytest.raises(ValueError, match="no finished shard set"):
        ShardSet.open(address(server) + "/nowhere")
    server.failing, server.ranges = False, False  # a server that ignores Range gives all at once, which is as good
    assert np.array_equal(ShardSet.open(address(server)).split("test").bytes(0), local.split("test").bytes(0))
    server.ranges = True
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in local.path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tar = copy / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\1")
    server.folder = copy
    with pytest.raises(ValueError, match="differs from its digest"):
        ShardSet.open(address(server)).split("train").bytes(0)


def test_a_set_is_uploaded_whole_and_never_over_another(local, tmp_path, monkeypatch):
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "cache"))
    upload(local.path, "memory://there/set")
    upload(local.path, "memory://there/set")
    found = ShardSet.open("memory://there/set")
    assert found.digest == local.digest
    assert np.array_equal(found.split("test").bytes(1), local.split("test").bytes(1))
    other = prepare(read_celeba(write_celeba(tmp_path / "source", 20)), tmp_path / "other", workers=1)
    with pytest.raises(ValueError, match="another set"):
        upload(other.path, "memory://there/set")


@pytest.mark.parametrize("name", ["train-000001.tar", "manifest.parquet", "dataset.json"])
def test_an_upload_that_went_wrong_is_found_by_its_digest_and_mended(local, tmp_path, monkeypatch, name):
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "cache"))
    there = tmp_path / "there"
    upload(local.path, there.as_uri())
    whole = (there / name).read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in there.iterdir()}
    (there / name).write_bytes(whole[:1000] + b"\xff" * 50 + whole[1050:])  # of the right size
    upload(local.path, there.as_uri())
    assert (there / name).read_bytes() == whole and verify(there, workers=1).records == COUNT
    assert [path.name for path in there.iterdir() if path.stat().st_mtime_ns != times[path.name]] == [name]


def test_an_upload_that_arrives_otherwise_or_begins_damaged_is_refused(local, tmp_path, monkeypatch):
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "cache"))
    original = source.Place.write_file

    def wrong(self: source.Place, path: Path) -> None:
        other = tmp_path / Path(path).name
        other.write_bytes(bytes(Path(path).stat().st_size))
        original(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(source.Place, "write_file", wrong)
        with pytest.raises(ValueError, match="is not what was sent, .*; upload it again"):
            upload(local.path, "memory://wrong/set")
    upload(local.path, "memory://wrong/set")
    assert ShardSet.open("memory://wrong/set").digest == local.digest
    copy = Path(shutil.copytree(local.path, tmp_path / "copy"))
    data = (copy / "train-000000.tar").read_bytes()
    (copy / "train-000000.tar").write_bytes(data[:-1] + b"\1")
    with pytest.raises(ValueError, match="train-000000.tar differs from its digest; run 'fader verify"):
        upload(copy, "memory://other/set")
    with pytest.raises(ValueError, match="no finished shard set"):
        ShardSet.open("memory://other/set")


def test_the_cache_is_called_by_what_it_holds(local, tmp_path, monkeypatch):
    """Another set at the same address does not take, or remove, what was kept of the first."""
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "cache"))
    upload(local.path, "memory://first/set")
    upload(local.path, "memory://second/set")
    first = ShardSet.open("memory://first/set").split("train")
    first.bytes(0)
    assert ShardSet.open("memory://second/set").split("train").shards[first.shard[0]].exists()
    other = prepare(read_celeba(write_celeba(tmp_path / "source", 20)), tmp_path / "other", workers=1)
    import fsspec

    fsspec.filesystem("memory").rm("/first/set", recursive=True)
    upload(other.path, "memory://first/set")
    assert ShardSet.open("memory://first/set").digest == other.digest
    assert first.shards[first.shard[0]].exists()


def batches_of(split: Split, kind: str = "dali", **options: object) -> Iterator[Batch]:
    """Twice through the split, tar after tar."""
    plan = Plan(len(split), seed=3, window=1, shard_of=split.shard)
    requests = [Request("a", draw, plan.rows("a", draw, 4), flip=True) for draw in range(len(split) // 2)]
    cache = options.pop("cache", "none")
    loader = open_loader(kind, cache, split, split.attributes, Preprocessing(16), seed=3, **options)
    return loader.batches(requests)


@pytest.mark.parametrize("kind", ["dali", "pillow"])
def test_tars_to_come_are_fetched_ahead_from_a_server_that_fails(server, local, kind):
    split = ShardSet.open(address(server)).split("train")
    batches = batches_of(split, kind, prefetch=1)
    found = [next(batches)]
    deadline = time.monotonic() + 60
    while sum(path.exists() for path in split.shards) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(path.exists() for path in split.shards) >= 3, "nobody asked for more than one"
    found += list(batches)
    assert server.faults > 3 and not [t for t in threading.enumerate() if t.name.startswith("fetch")]
    for a, b in zip(found, batches_of(local.split("train"), kind), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.attributes, b.attributes)


def test_closing_gives_up_what_is_on_its_way(server, monkeypatch):
    began, go = threading.Event(), threading.Event()
    original = source.Place.read_part

    def slow(self: source.Place, offset: int, size: int) -> bytes:
        if offset and threading.current_thread().name.startswith("fetch"):
            began.set()
            go.wait(60)
        return original(self, offset, size)

    split = ShardSet.open(address(server)).split("train")
    ahead = remote.Ahead(split.remote)
    monkeypatch.setattr(source.Place, "read_part", slow)
    for shard in split.shards:
        ahead.want(shard.name)
    assert began.wait(60)
    threading.Timer(0.2, go.set).start()
    ahead.close()
    assert not [path for path in split.shards if path.exists()] and not list(split.shards[0].parent.glob("*.part"))
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch")]


def test_a_set_whose_pictures_are_kept_is_fetched_no_more(server):
    server.failing = False
    split = ShardSet.open(address(server)).split("train")
    batches = batches_of(split, cache="device")
    for _ in range(-(-len(split) // 4) + 4):
        next(batches)
    count = server.count
    for path in split.shards:
        path.unlink()
    list(batches)
    assert server.count == count


def test_a_set_at_an_address_is_verified_as_one_on_a_disk(server, local, tmp_path, monkeypatch):
    monkeypatch.setenv("FADER_CACHE_GB", str(2 * max(path.stat().st_size for path in local.path.glob("*.tar")) / 1e9))
    assert verify(address(server), workers=1).records == COUNT
    kept = next(ShardSet.open(address(server)).path.glob("*.tar"))
    kept.write_bytes(bytes(kept.stat().st_size))  # it rots in the cache
    assert verify(address(server), workers=1).records == COUNT
    copy = tmp_path / "damaged"
    shutil.copytree(local.path, copy)
    tar = copy / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\1")
    server.folder, server.failing = copy, False
    monkeypatch.setenv("FADER_CACHE", str(tmp_path / "another"))
    with pytest.raises(ValueError, match="1 places: .*train-000001.tar differs from its digest"):
        verify(address(server), workers=1)
