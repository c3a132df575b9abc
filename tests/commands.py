"""Real commands in real processes: how tests start what a user starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(
    module: str, *words: str | Path, processes: int = 1, launcher: Sequence[str | Path] = ()
) -> list[str]:
    """`python -m MODULE …`, the same on several CPU ranks, or through `accelerate launch` with `launcher`'s words."""
    if launcher:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launcher)]
        free = [] if "--main_process_port" in launcher else ["--main_process_port", "0"]
        return [*accelerate, *free, "-m", module, *map(str, words)]
    if processes == 1:
        return [sys.executable, "-m", module, *map(str, words)]
    config = ROOT / "launch/accelerate/cpu.yaml"
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    return [sys.executable, *accelerate, "--num_processes", str(processes), "-m", module, *map(str, words)]


def environment(**extra: str) -> dict[str, str]:
    """This environment with the project in reach, one thread a process, and no colours."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **extra}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_rank(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells one of several ranks of this machine, without one."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def interruptible() -> None:
    """For `preexec_fn`: the child takes Ctrl-C also where the tests run as a background job, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(
    module: str,
    *words: str | Path,
    launcher: Sequence[str | Path] = (),
    cwd: Path = ROOT,
    code: int = 0,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """Run to the end and hold the exit code."""
    line: Sequence[str] = command(module, *words, launcher=launcher)
    done = subprocess.run(line, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=900)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
