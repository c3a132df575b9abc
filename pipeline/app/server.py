"""The page's files, one WebSocket a person, and who may open one."""

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket as sockets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import Response

from pipeline.app.messages import Message, Models, Move, Pick, Watch, packed, read
from pipeline.app.session import Session
from pipeline.app.shelf import Opened, Shelf
from pipeline.app.study import Rater, Study
from pipeline.models import Model

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
STUDY_FILES = FILES | {
    "/": ("study.html", "text/html; charset=utf-8"),
    "/page.js": ("study.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
REPORT_HEADERS = HEADERS | {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IDLE, FULL = 4000, 4001  # codes with which a WebSocket is closed, beside the standard's


@dataclass(frozen=True)
class Limits:
    """What one person may ask of the server. sessions: people at once. idle_seconds: after which one is let go."""

    upload_bytes: int = 20_000_000
    pixels: int = 40_000_000
    sessions: int = 64
    idle_seconds: float = 900.0


@dataclass
class Service:
    """What all sessions share. Photos are read by one worker, moves decoded by another, so that sliders do not wait.
    token: whoever opens a WebSocket must know it; None for a page that only this machine reaches.
    study: where there is one, its pictures are the page."""

    shelf: Shelf
    aligner: Model | None = None
    token: str | None = None
    study: Study | None = None
    limits: Limits = Limits()
    people: int = 0
    reading: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "photos"))
    moving: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "moves"))

    def admits(self, headers: Any, token: str | None) -> bool:
        """Whether a WebSocket comes from our own page: of this host and, where there is a token, with it."""
        host, origin = headers.get("host", ""), urlsplit(headers.get("origin", ""))
        return bool(host) and origin.netloc == host and origin.scheme in ("http", "https") and self.trusts(host, token)

    def trusts(self, host: str, token: str | None) -> bool:
        """Whether a request to this host may read what is private: it has the token, where there is one.
        Without a token the host must be this machine by name, because another site's name may be made to lead here."""
        if self.token is None:
            return urlsplit(f"//{host}").hostname in LOOPBACK
        return secrets.compare_digest((token or "").encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to this host."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host in LOOPBACK


def build(service: Service) -> FastAPI:
    """Return the application: the page's files and `/socket`."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for path, (name, kind) in (STUDY_FILES if service.study else FILES).items():
        app.add_api_route(path, _file((PAGE / name).read_bytes(), kind), methods=["GET"])

    @app.get("/report/{run}")
    def report(request: Request, run: str, token: str | None = None) -> Response:
        page = service.shelf.report(run) if service.trusts(request.headers.get("host", ""), token) else None
        return Response(page or b"there is no such report", 200 if page else 404, REPORT_HEADERS, "text/html; charset=utf-8")

    @app.websocket("/socket")
    async def socket(person: WebSocket, token: str | None = None) -> None:
        if not service.admits(person.headers, token):
            await person.close(1008)
            return
        await person.accept()
        if service.people >= service.limits.sessions:
            await person.close(FULL, f"{service.limits.sessions} people are here already; try again later")
            return
        service.people += 1
        try:
            await _serve(person, service)
        finally:
            service.people -= 1

    return app


def _file(content: bytes, kind: str) -> Callable[[], Response]:
    return lambda: Response(content, media_type=kind, headers=HEADERS)


async def _serve(person: WebSocket, service: Service) -> None:
    """Talk with one person until they leave or are idle."""
    session: Session | Rater = Rater(service.study) if service.study else _session(service, service.shelf.first)
    newest: asyncio.Queue[tuple[Session, Move]] = asyncio.Queue(1)  # a newer move replaces the last, so that none queue
    moves = asyncio.create_task(_show_moves(person, newest, service.moving))
    loop = asyncio.get_running_loop()
    try:
        await person.send_json(_about(session, service))
        while True:
            got = await asyncio.wait_for(person.receive(), service.limits.idle_seconds)
            if got["type"] == "websocket.disconnect":
                return
            try:
                message, data = read(got["bytes"] if got.get("bytes") is not None else got["text"])
                if isinstance(message, Move) and isinstance(session, Session):
                    if newest.full():
                        newest.get_nowait()
                    newest.put_nowait((session, message))
                    continue
                if isinstance(message, Models | Watch) and not service.study:  # files and MLflow; photos need not wait
                    answer = await asyncio.to_thread(_listed, service.shelf, message)
                elif isinstance(message, Pick) and not service.study:
                    chosen = await loop.run_in_executor(service.reading, service.shelf.open, message.address)
                    session = _session(service, chosen)
                    answer = _about(session, service)
                else:
                    answer = await loop.run_in_executor(service.reading, session.answer, message, data)
            except ValueError as error:
                answer = _failure(error)
            await (person.send_bytes(answer) if isinstance(answer, bytes) else person.send_json(answer))
    except TimeoutError:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await person.close(IDLE, f"nothing moved for {service.limits.idle_seconds / 60:.0f} minutes")
    except WebSocketDisconnect:
        pass
    finally:
        moves.cancel()
        with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect):
            await moves


def _session(service: Service, chosen: Opened) -> Session:
    return Session(chosen.model, chosen.editing, service.aligner, service.limits.pixels)


def _about(session: Session | Rater, service: Service) -> dict[str, Any]:
    return session.about() | {"upload_bytes": service.limits.upload_bytes}


def _listed(shelf: Shelf, message: Message) -> dict[str, Any]:
    return shelf.training(message.run, message.size) if isinstance(message, Watch) else shelf.listing()


async def _show_moves(person: WebSocket, newest: asyncio.Queue, worker: ThreadPoolExecutor) -> None:
    """Decode the newest move, send its picture, and so on."""
    loop = asyncio.get_running_loop()
    while True:
        session, move = await newest.get()
        try:
            picture = await loop.run_in_executor(worker, session.shown, move.sliders)
        except ValueError as error:
            await person.send_json(_failure(error))
            continue
        await person.send_bytes(packed({"kind": "shown", "number": move.number}, picture))


def _failure(error: ValueError) -> dict[str, str]:
    return {"kind": "error", "text": " ".join(str(error).split())}


def listener(host: str, port: int) -> sockets.socket:
    """Return a socket that listens there; port 0 takes any that is free.
    Raises ValueError: the address is not free, or is none of this machine."""
    try:
        kind = sockets.AF_INET6 if ":" in host else sockets.AF_INET
        return sockets.create_server((host, port), family=kind)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; choose another with --port") from None


def server(service: Service) -> uvicorn.Server:
    """Return what serves the page; `run(sockets=[…])` does until it is told to stop."""
    config = uvicorn.Config(
        build(service), log_level="warning", access_log=False, server_header=False, ws="websockets-sansio",
        ws_max_size=service.limits.upload_bytes + 4_096, ws_per_message_deflate=False, timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)
