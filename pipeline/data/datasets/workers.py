"""Work spread over threads or processes of one machine, with progress, Ctrl-C and a killed worker handled once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Progress = Callable[[int, int], None]
"""Called with (records done, records in all), now and then."""

Job = TypeVar("Job")
Result = TypeVar("Result")

_shared = threading.local()
"""What a worker shares with the process that started it: `count`, of records, and `stop`, which is not 0 when it is to stop.
`waiting` are records that are not in the count yet."""

_TOGETHER = 32  # records that are counted at once


def silent(done: int, total: int) -> None:
    """A progress function that shows nothing."""


def tick(records: int = 1) -> None:
    """Count records, and stop when asked to. A function that runs under `spread` calls it for each record."""
    _shared.waiting += records
    if _shared.waiting < _TOGETHER:
        return
    with _shared.count.get_lock():
        _shared.count.value += _shared.waiting
    _shared.waiting = 0
    if _shared.stop.value:
        raise InterruptedError("stopped: another part failed or was interrupted")


def _join(count: Any, stop: Any) -> None:
    _shared.count, _shared.stop, _shared.waiting = count, stop, 0
    if parent := multiprocessing.parent_process():  # a process that dies with its parent
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _begin_thread(count: Any, stop: Any) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes that it starts never see Ctrl-C; the main thread does
    _join(count, stop)


def spread(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None, total: int, progress: Progress,
    few: int = 50_000,
) -> list[Result]:
    """Call `function` with every job, in processes, or in threads where records are few; return its results in order.

    Reading, digests and decoding leave the interpreter's lock to others, so threads keep some cores busy at once; a process
    takes as long to start as a thread takes for some 10,000 small pictures. So this process takes jobs from the start, and one
    process fewer is started than there are workers. few: fewer records than these get threads; 0 where
    `function`, which pickles and calls `tick()` once a record, holds the lock. workers: None: one for each core.

    Raises what `function` raises, or KeyboardInterrupt, when all have stopped; OSError when one was killed.
    """
    few_records = workers is None and total < few
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), len(jobs)))
    threads = few_records or workers == 1
    context = multiprocessing.get_context("fork" if threads else "spawn")  # fork's lock needs no process that tracks it
    shared = count, stop = context.Value("q", 0), context.RawValue("b", 0)
    executor = ThreadPoolExecutor(workers, "worker", _begin_thread, shared)
    processes = None if threads else ProcessPoolExecutor(workers - 1, context, _join, shared)
    here = threading.Semaphore(1 if processes else workers)  # threads that may work in this process at once

    def call(job: Job) -> Result:
        if not here.acquire(blocking=False):
            return processes.submit(function, job).result()
        try:
            return function(job)
        finally:
            here.release()

    try:
        futures = [executor.submit(call, job) for job in jobs]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            progress(count.value, total)
        progress(total, total)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed (out of memory?); run again, with fewer workers") from error
    finally:
        stop.value = 1
        executor.shutdown(wait=True, cancel_futures=True)
        if processes:
            processes.shutdown()
