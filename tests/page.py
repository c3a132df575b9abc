"""The page as tests open it: served from this process, spoken to over a WebSocket as the page's script speaks."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from pipeline import models
from pipeline.app import server
from tests.runs import make_run, painter


@contextlib.contextmanager
def painted(folder: Path) -> Iterator[models.Model]:
    """Give a model whose edits are known colours, with its judge, made in a folder."""
    with painter() as method:
        make_run(folder / "judge", method)
        yield models.load(make_run(folder / "painter", method, judge=str(folder / "judge")))


@contextlib.contextmanager
def serving(service: server.Service, port: int = 0) -> Iterator[str]:
    """Serve the page in a thread; gives host and port as HOST:PORT."""
    listener = server.listener("127.0.0.1", port)
    running = server.server(service)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


@dataclass
class Person:
    """One WebSocket. model: what the server said of the model."""

    socket: ClientConnection
    model: dict[str, Any]

    def say(self, head: dict[str, Any], data: bytes | None = None) -> None:
        text = json.dumps(head)
        self.socket.send(text if data is None else len(text).to_bytes(4, "big") + text.encode() + data)

    def hear(self) -> tuple[dict[str, Any], bytes]:
        got = self.socket.recv(timeout=120)
        if isinstance(got, str):
            return json.loads(got), b""
        end = 4 + int.from_bytes(got[:4], "big")
        return json.loads(got[4:end]), got[end:]

    def ask(self, head: dict[str, Any], data: bytes | None = None) -> tuple[dict[str, Any], bytes]:
        self.say(head, data)
        return self.hear()

    def give(self, data: bytes, name: str = "a.png", align: bool = False) -> dict[str, Any]:
        return self.ask({"kind": "photo", "name": name, "align": align}, data)[0]

    def move(self, number: int = 1, **sliders: float) -> np.ndarray:
        head, picture = self.ask({"kind": "move", "number": number, "sliders": sliders})
        assert head == {"kind": "shown", "number": number}, head
        return pixels(picture)


@contextlib.contextmanager
def person(address: str, origin: str | None = "", query: str = "") -> Iterator[Person]:
    """Come to the page. origin: of the page that opens the WebSocket; by default the server's own."""
    origin = f"http://{address}" if origin == "" else origin
    with connect(f"ws://{address}/socket{query}", origin=origin, max_size=None, compression=None) as socket:
        yield Person(socket, json.loads(socket.recv(timeout=60)))


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def photo(colour: tuple[int, int, int] = (0, 0, 0), size: tuple[int, int] = (178, 218), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()
