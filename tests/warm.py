"""Commands in processes forked from one that has imported torch and the project already.

A command that starts anew imports for five seconds before it does anything, a rank under a launcher for eight. Where a
test is about what a command does and not about how it starts, it says `forked` instead of `commands.launch`: the same
module, words, environment, folder and exit code, in a process of its own. Several ranks get what a launcher sets.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.commands import ROOT, environment

PATIENCE_SECONDS = 900


@cache
def _server() -> ForkServerContext:
    """Its process starts here, with the environment of all that will be forked from it."""
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    with _environment(environment()), contextlib.chdir(ROOT):
        ensure_running()
    return context


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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
        for rank in ranks:
            rank.join(PATIENCE_SECONDS)
        hanging = [rank for rank in ranks if rank.exitcode is None]
        for rank in hanging:
            rank.kill()
            rank.join()
        out, err = ("".join(file.read_text() for file in kind if file.exists()) for kind in zip(*files))
    codes = [rank.exitcode for rank in ranks]
    assert not hanging, f"{len(hanging)} of {processes} did not end\n{out}\n{err}"
    assert codes == [code] * processes, f"exit codes {codes}\n{out}\n{err}"
    return subprocess.CompletedProcess(line, code, out, err)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What launch/accelerate/cpu.yaml makes a launcher set for each rank; nothing for one process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


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
