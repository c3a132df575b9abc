"""Cells: checks and benchmarks that run in processes of their own, so that a crash of one costs only its row.

All processes start together and import what they need. Then cells that time nothing run beside each other, and those
that measure speed run one after another, with nothing beside them.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Row = dict[str, Any]
START_SECONDS = 180  # imports of all processes at once, which a machine of few cores takes one after another


@dataclass(frozen=True)
class Cell:
    """run: gives a dict of results, or raises. seconds: its time limit. timed: it measures speed."""

    run: Callable[[], Row]
    seconds: int
    timed: bool

    @property
    def says(self) -> str:
        return (self.run.__doc__ or "").split("\n")[0]


CELLS: dict[str, Cell] = {}


def cell(seconds: int, timed: bool = False) -> Callable[[Callable[[], Row]], Callable[[], Row]]:
    """Register a cell under its function's name."""

    def add(function: Callable[[], Row]) -> Callable[[], Row]:
        CELLS[function.__name__] = Cell(function, seconds, timed)
        return function

    return add


def in_turns(names: Sequence[str]) -> list[list[str]]:
    """Cells that run at the same time, turn after turn: those that time nothing, then each of the others alone."""
    together = [name for name in names if not CELLS[name].timed]
    return ([together] if together else []) + [[name] for name in names if CELLS[name].timed]


@dataclass
class _Running:
    name: str
    process: BaseProcess
    pipe: Connection
    began: float = 0.0

    @property
    def deadline(self) -> float:
        return self.began + CELLS[self.name].seconds

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def run_cells(names: Sequence[str], imports: str = "tests.imported") -> Iterator[Row]:
    """Run cells and yield a row of each as it ends: its name, whether it passed, seconds, and what it returned.

    Args:
        imports: the module that every process imports before the clock runs.
    """
    started = {name: _start(name, imports) for name in names}
    try:
        for running in started.values():
            running.pipe.poll(START_SECONDS)  # it is ready, or it ended
        for turn in in_turns(names):
            yield from _run_turn([started[name] for name in turn])
    finally:
        for running in started.values():
            running.kill()


def _start(name: str, imports: str) -> _Running:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_in_process, args=(CELLS[name].run, imports, there))
    process.start()
    there.close()
    return _Running(name, process, here)


def _in_process(run: Callable[[], Row], imports: str, pipe: Connection) -> None:
    os.setsid()
    importlib.import_module(imports)
    pipe.send("ready")
    pipe.recv()
    try:
        pipe.send((True, run()))
    except BaseException:  # a cell's failure is its result; the row shows it
        pipe.send((False, {"error": traceback.format_exc()[-3000:]}))


def _run_turn(waiting: list[_Running]) -> Iterator[Row]:
    for running in waiting:
        running.began = time.monotonic()
        with contextlib.suppress(EOFError, OSError):  # of a process that ended; it is seen below
            running.pipe.recv()
            running.pipe.send("go")
    while waiting:
        patience = min(running.deadline for running in waiting) - time.monotonic()
        answered = wait([running.pipe for running in waiting], max(patience, 0))
        for running in [r for r in waiting if r.pipe in answered or r.deadline <= time.monotonic()]:
            passed, result = _result(running) if running.pipe in answered else (False, {"error": "no result in time"})
            seconds = time.monotonic() - running.began
            running.kill()
            waiting.remove(running)
            yield {"cell": running.name, "passed": passed, "seconds": round(seconds, 1), **result}


def _result(running: _Running) -> tuple[bool, Row]:
    try:
        return running.pipe.recv()
    except EOFError:
        running.process.join()
        return False, {"error": f"it ended without a result, exit code {running.process.exitcode}"}
