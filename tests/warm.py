"""Commands in processes forked from one that has imported torch and the project already.

A command that starts anew imports for five seconds before it does anything, a rank under a launcher for eight. Where a
test is about what a command does and not about how it starts, it says `forked` instead of `commands.launch`: the same
module, words, environment, folder and exit code, in a process of its own. Several ranks get what a launcher sets.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.commands import ROOT, as_rank, environment, free_port

PATIENCE_SECONDS = 900


@cache
def _server() -> ForkServerContext:
    """Its process starts here, with the environment of all that will be forked from it."""
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    with pytest.MonkeyPatch.context() as here:
        here.chdir(ROOT)
        for name, value in environment().items():
            here.setenv(name, value)
        ensure_running()
    return context


def forked(
    module: str, *words: str | Path, processes: int = 1, cwd: Path = ROOT, code: int = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE …` to its end, on one or several CPU ranks, and hold the exit code of each."""
    line = [module, *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(processes)]
        ranks = [
            _server().Process(target=_become, args=(line, str(cwd), environment(**variables, **extra), *map(str, pair)))
            for variables, pair in zip(_ranks(processes), files)
        ]
        for rank in ranks:
            rank.start()
        hanging = _ended(ranks, code)
        out, err = ("".join(file.read_text() for file in kind if file.exists()) for kind in zip(*files))
    codes = [rank.exitcode for rank in ranks]
    assert codes == [code] * processes, f"exit codes {codes}, of which {hanging} had to be killed\n{out}\n{err}"
    return subprocess.CompletedProcess(line, code, out, err)


def _ended(ranks: Sequence[BaseProcess], code: int) -> int:
    """Wait for all; when one fails, or patience ends, kill the others, as a launcher does. Returns how many were killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while running := [rank for rank in ranks if rank.exitcode is None]:
        ended = wait([rank.sentinel for rank in running], deadline - time.monotonic())
        if not ended or any(rank.exitcode not in (None, code) for rank in ranks):
            break
    hanging = [rank for rank in ranks if rank.exitcode is None]
    for rank in hanging:
        rank.kill()
        rank.join()
    return len(hanging)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What launch/accelerate/cpu.yaml makes a launcher set for each rank; nothing for one process."""
    if processes == 1:
        return [{}]
    port = free_port()
    return [{**as_rank(rank, processes, port), "ACCELERATE_MIXED_PRECISION": "no"} for rank in range(processes)]


def _become(line: list[str], cwd: str, variables: dict[str, str], out: str, err: str) -> None:
    """In the child: everything as a new interpreter would have it, then the module as the main program."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = list(line)
    try:
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes leave them out
