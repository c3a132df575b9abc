"""Work spread over processes of one machine, and the lock that keeps two writers apart.

A worker that dies with its parent, leaves Ctrl-C to it and prints no traceback of its own is what every command that
reads or writes many files needs; it stands here once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Progress = Callable[[int, int], None]
"""Called with (records done, records in all), now and then."""

Job = TypeVar("Job")
Result = TypeVar("Result")


def silent(done: int, total: int) -> None:
    """The progress of whoever does not look."""


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """One writer at a time; the lock ends with the process, however that ends.

    Raises:
        ValueError: another process holds it.
    """
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(f"another process is writing to {what}; wait for it, or choose another folder") from None
        yield


@dataclass
class _Shared:
    """What workers share with the process that started them: a counter of records and a wish to stop."""

    count: Any = None
    stop: Any = None
    unreported: int = 0

    def flush(self) -> None:
        with self.count.get_lock():
            self.count.value += self.unreported
        self.unreported = 0


_shared = _Shared()


def tick() -> None:
    """To be called once a record by a function that runs under `in_processes`: counts, and stops when asked to."""
    _shared.unreported += 1
    if _shared.unreported >= 32:
        _shared.flush()
        if _shared.stop.is_set():
            raise InterruptedError("stopped: another part failed or was interrupted")


def _start_worker(count: Any, stop: Any) -> None:
    _shared.count, _shared.stop = count, stop
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _call(function: Callable[[Job], Result], job: Job) -> Result:
    try:
        return function(job)
    finally:
        _shared.flush()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None, total: int, progress: Progress
) -> list[Result]:
    """`function` of every job, in the order of the jobs; in this process when one worker is enough.

    Args:
        function: defined in a module, so that it pickles. It calls `tick()` once a record.
        workers: processes; None: one for each core this process may use.
        total: records in all, for `progress`.

    Raises:
        whatever `function` raises, and KeyboardInterrupt, after the other workers have stopped; OSError when one of
        them was killed.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    if workers <= 1:
        _shared.count, _shared.stop, out = count, stop, []
        for job in jobs:
            out.append(_call(function, job))
            progress(count.value, total)
        return out
    executor = ProcessPoolExecutor(workers, context, _start_worker, (count, stop))
    try:
        with _ignoring_interrupts():
            futures = [executor.submit(_call, function, job) for job in jobs]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            progress(count.value, total)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed (out of memory?); run again, with fewer workers") from error
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
