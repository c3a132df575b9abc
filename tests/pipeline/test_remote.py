"""Shard sets behind a web server that fails: what arrives is whole, and the cache keeps to its limit."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline import remote
from pipeline.datasets import source
from pipeline.datasets.celeba import read_celeba
from pipeline.shards import ShardSet, prepare, upload, verify
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
        ShardSet.open(address(server)).split("train")._mapped(split.shards[0].with_name("train-000000.tar"))


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
