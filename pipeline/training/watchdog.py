"""End a run that hangs, and say which rank it is: a thread a rank, which the loop tells what it begins.

When one rank of several stands still, all do: the others wait for it in their next collective. So each rank's thread keeps a
small file, `RUN/ranks/00000.json`, with how far its loop has come; it needs no collective and no launcher's store for that. The
thread whose loop has not moved for too long reads them all. A rank whose file is old runs no more (stopped, or its machine is
gone); of those that run, the ones that are behind hold up the others. What hangs is named, every thread's stack goes to
`RUN/ranks/00000.stack`, and the process ends with `EXIT_HUNG`, so that a launcher or a batch system can start the run again. A
rank of the same machine that runs no more is killed first: a launcher would wait 30 seconds for it to heed a SIGTERM.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.files import write_whole

log = logging.getLogger(__name__)

EXIT_HUNG = 70
SLOW = 6  # times the patience, for what may take long: the first batch, a checkpoint, validation
_POLLS = 20  # in one patience
_POLL_SECONDS = (0.2, 15.0)
_FAREWELL_SECONDS = 2.0  # for the log and the tracker to get rid of the news


@dataclass(frozen=True)
class _Rank:
    """What a rank's file says.
    started: when its process did. marks: how many things it has begun. idle: seconds since it began the last of them.
    silent: seconds since it wrote the file."""

    rank: int
    host: str
    pid: int
    started: float
    marks: int
    what: str
    slow: bool
    idle: float
    silent: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}), at {self.what}"


class Watchdog:
    """Watches, while entered, that `at` is called.
    run: the run's folder, which all ranks see.
    minutes: without a call of `at` after which the run hangs; `SLOW` times that after a slow one. 0 = never.
    tell: called once with the verdict, before the process ends."""

    def __init__(
        self, run: Path, rank: int, world_size: int, minutes: float, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder, self.rank, self.world_size = run / "ranks", rank, world_size
        self.patience = minutes * 60
        self.tell = tell
        started = psutil.Process().create_time()
        self._process = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
        self._mark = (0, "its start", True)
        self._poll = min(max(self.patience / _POLLS, _POLL_SECONDS[0]), _POLL_SECONDS[1])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, what: str, slow: bool = False) -> None:
        """Note that the loop begins something. All ranks must call it alike, because one that has called it less is behind."""
        self._mark = (self._mark[0] + 1, what, slow)

    def __enter__(self) -> "Watchdog":
        if self.patience:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.patience:
            self._thread.join()
            self._file(self.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        """Watch in a thread. Idle time is summed over polls, so that time in which this process was stopped does not count."""
        seen, idle = self._mark, 0.0
        while not self._over.wait(self._poll):
            if self._mark is not seen:
                seen, idle = self._mark, 0.0
            else:
                idle += self._poll
            self._publish(idle)
            if idle >= self.patience * (SLOW if seen[2] else 1):
                ranks = self._others()
                verdict = self._verdict(ranks)
                if verdict:
                    self._end(verdict, [rank for rank in ranks if self._is_silent(rank)])

    def _publish(self, idle: float) -> None:
        about = {**self._process, **dict(zip(("marks", "what", "slow"), self._mark)), "idle": idle}
        try:
            write_whole(self._file(self.rank), json.dumps(about), durable=False)
        except OSError as error:  # a full disk is no reason to end; the other ranks may take this one for silent then
            log.debug("watchdog: %s", error)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}.json"

    def _others(self) -> list[_Rank]:
        """Return every rank whose file can be read, with its age by this rank's own file, which has just been written."""
        ranks = []
        now = self._file(self.rank).stat().st_mtime if self._file(self.rank).exists() else time.time()
        for rank in range(self.world_size):
            try:
                silent = max(now - self._file(rank).stat().st_mtime, 0.0)
                ranks.append(_Rank(silent=silent, **json.loads(self._file(rank).read_text())))
            except (OSError, ValueError, TypeError):
                continue  # not written yet, or gone
        return ranks

    def _verdict(self, ranks: list[_Rank]) -> str | None:
        """Return which ranks hang, in words; None while some rank may still take its time."""
        silent = [rank for rank in ranks if self._is_silent(rank)]
        running = [rank for rank in ranks if rank not in silent]
        missing = sorted(set(range(self.world_size)) - {rank.rank for rank in ranks})
        if silent or missing:
            return "; ".join([*(f"{rank}: runs no more" for rank in silent), *(f"rank {rank}: never seen" for rank in missing)])
        if any(rank.slow and rank.idle < self.patience * SLOW for rank in running):
            return None
        last, first = min(rank.marks for rank in running), max(rank.marks for rank in running)
        behind = [rank for rank in running if rank.marks == last]
        words = "hangs" if last < first or self.world_size == 1 else "hangs, and so do all"
        return "; ".join(f"{rank}: {words}" for rank in behind)

    def _is_silent(self, rank: _Rank) -> bool:
        return rank.silent > self.patience / 2

    def _end(self, verdict: str, silent: list[_Rank]) -> None:
        stack = self._file(self.rank).with_suffix(".stack")
        text = f"no step for {self.patience / 60:g} minutes: {verdict}"
        words = "%s. Rank %d ends with code %d, its stacks are in %s; checkpoints are intact"
        log.critical(words, text, self.rank, EXIT_HUNG, stack)
        try:
            with stack.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.error("stacks not written: %s", error)
        self.tell(text)
        time.sleep(_FAREWELL_SECONDS)
        for rank in silent:
            _kill(rank)
        os._exit(EXIT_HUNG)


def _kill(rank: _Rank) -> None:
    """Kill a rank's process if it is of this machine and still the one that wrote the file."""
    if rank.host != socket.gethostname():
        return
    try:
        process = psutil.Process(rank.pid)
        if process.create_time() == rank.started:
            process.kill()
    except psutil.Error as error:
        log.debug("watchdog: %s", error)


def clear(run: Path) -> None:
    """Remove the files of an earlier attempt's ranks, but not their stacks; one rank does it, before it is watched."""
    for left in (run / "ranks").glob("*.json"):
        left.unlink(missing_ok=True)
