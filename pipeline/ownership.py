"""Keep a folder to one process at a time, on this machine and on others that see it.

A lock of the system keeps two processes of one machine apart; it ends with its process, however that ends. Not every
shared file system carries it to other machines. So the owner also writes its name into the file that it locks, and
touches the file every few seconds: whoever finds the name of another machine watches whether the file is still touched.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

TOUCH_SECONDS = 5.0
STALE_SECONDS = 30.0  # an owner on another machine that has not touched its file for so long is gone
_POLL_SECONDS = 0.5


class Owner:
    """This process, as the owner of a folder."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._about = json.dumps({**about, "token": secrets.token_hex(8)})
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="owner", daemon=True)
        self.path.write_text(self._about)
        self._thread.start()

    def check(self) -> None:
        """Raise ValueError, and say who it was, where somebody took the folder over while this process stood still."""
        now = self.path.read_text() if self.path.exists() else ""
        if now != self._about:
            raise ValueError(f"{self.what} was taken over by {_named(now)}, because this process stood still; it ends here")

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self._about:
                self.path.write_text("")

    def _touch(self) -> None:
        while not self._over.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):  # a disk that refuses for a while
                os.utime(self.path)


@contextlib.contextmanager
def owned(path: Path, what: str, *, shared: bool = False) -> Iterator[Owner | None]:
    """Own what a file stands for, as long as this lasts; the folder of the file must be there.
    path: the file, made when it is not there. what: is named in errors.
    shared: beside others who share it, but not beside an owner; gives None.
    Raises ValueError: another process owns it, and which."""
    with open(path, "a+") as file:  # over NFS a shared lock wants to read, the other one to write
        locks = _lock(file, what, path, shared)
        if shared:
            yield None
            return
        _wait_for_another_machine(path, what, locks)
        owner = Owner(path, what)
        try:
            yield owner
        finally:
            owner.release()


def _lock(file, what: str, path: Path, shared: bool) -> bool:
    """Take the system's lock; return False where the file system has none."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ValueError(_refusal(what, path.read_text())) from None
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def _wait_for_another_machine(path: Path, what: str, locks: bool) -> None:
    """Watch an owner whom the system's lock does not tell of, until it shows that it lives or is taken for gone."""
    before, touched = path.read_text(), path.stat().st_mtime_ns
    if not before or (locks and _read(before).get("host") == socket.gethostname()):
        if before:
            log.info("%s was left by %s, which is gone", what, _named(before))
        return
    age = _now(path.parent) - touched / 1e9
    if age < STALE_SECONDS:
        left = STALE_SECONDS - age
        log.info("%s was last owned by %s; waiting up to %.0f s to see whether it is gone", what, _named(before), left)
    while age < STALE_SECONDS:
        time.sleep(_POLL_SECONDS)
        age += _POLL_SECONDS
        if path.read_text() != before or path.stat().st_mtime_ns != touched:
            raise ValueError(_refusal(what, path.read_text()))
    log.warning("%s was left by %s, which has been silent for %.0f s", what, _named(before), age)


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which may not be this machine's."""
    probe = folder / f".clock.{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _read(about: str) -> dict[str, Any]:
    """Return what an owner wrote of itself; nothing where that cannot be read."""
    try:
        known = json.loads(about)
        return known if isinstance(known, dict) else {}
    except ValueError:
        return {}


def _named(about: str) -> str:
    known = _read(about)
    return "process {process} on {host} (since {since})".format(**known) if "process" in known else "another process"


def _refusal(what: str, about: str) -> str:
    return f"{what} belongs to {_named(about)} now; wait for it, end it, or choose another folder"
