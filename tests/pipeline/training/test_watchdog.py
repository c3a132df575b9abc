"""A run that hangs is ended, and the rank that holds it up is named: processes of the watchdog alone, and a real run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.training import watchdog
from tests.commands import ROOT, command, environment
from tests.launch.test_train import CONFIG, checkpoints

LOOP = """
import logging, sys, time
from pathlib import Path
from pipeline.training.watchdog import Watchdog

logging.basicConfig(format="%(message)s")
rank, world_size, stops, slow = map(int, sys.argv[2:6])
with Watchdog(Path(sys.argv[1]), rank, world_size, 1.5 / 60, tell=lambda text: print("told", text, flush=True)) as dog:
    for step in range(100):
        dog.at(f"batch {step}")
        time.sleep(0.05)
        dog.at(f"update {step}", slow=bool(slow) and step == stops)
        while step == stops:
            time.sleep(0.05)
        time.sleep(0.05)
print("ended well")
"""


def ranks(folder: Path, stops: list[int], slow: int = 0) -> list[subprocess.Popen]:
    """One process a rank, which stands still for good at a step (-1 = never)."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, folder, str(rank), str(len(stops)), str(at), str(slow)],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, at in enumerate(stops)
    ]  # fmt: skip


def test_the_rank_that_is_behind_is_named(tmp_path):
    """Rank 1 stands still at step 20, ranks 0 and 2 wait for it at step 21."""
    processes = ranks(tmp_path, [21, 20, 21])
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [watchdog.EXIT_HUNG] * 3, texts
    for text in texts:
        assert f"rank 1 (process {processes[1].pid} on" in text and "at update 20: hangs" in text
        assert "rank 0 (" not in text.split("Rank")[0] and "rank 2 (" not in text, "who waits is not blamed"
        assert "told no step for" in text
    assert 'File "<string>"' in (tmp_path / "ranks/00001.stack").read_text(), "where its main thread stands"


def test_a_rank_that_runs_no_more_is_named(tmp_path):
    processes = ranks(tmp_path, [20, 20])
    while not (tmp_path / "ranks/00001.json").exists():
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        text = processes[0].communicate(timeout=120)[0]
        assert processes[1].wait(10) == -signal.SIGKILL, "it lies on the same machine"
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == watchdog.EXIT_HUNG
    assert f"rank 1 (process {processes[1].pid} on" in text and "runs no more" in text and "rank 0 (" not in text


def test_what_may_take_long_is_given_its_time(tmp_path):
    (process,) = ranks(tmp_path, [3], slow=1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4.5)
    assert process.wait(120) == watchdog.EXIT_HUNG
    process.communicate()


def test_a_run_that_moves_is_left_alone_also_after_it_was_itself_stopped(tmp_path):
    (process,) = ranks(tmp_path, [-1])
    while not (tmp_path / "ranks/00000.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "ended well" in text and "no step" not in text
    assert not (tmp_path / "ranks/00000.json").exists()


@pytest.mark.ranks
def test_one_of_two_ranks_is_stopped_and_the_launcher_starts_the_run_again(faces, tmp_path):
    """The launcher may restart once: the watchdog ends what hangs, nothing of it keeps running, and the run goes on."""
    config, run, log = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "log"
    text = CONFIG.replace("FACES", str(faces)).replace("PRECISION", "fp32").replace("images: 1200", "images: 200000")
    config.write_text(text)
    launcher = ["--config_file", "launch/accelerate/cpu.yaml", "--rdzv_backend", "c10d", "--max_restarts", "1"]
    words = command("launch.train", config, f"run.folder={run}", "run.watchdog_minutes=0.1", "--continue", launcher=launcher)
    with log.open("w") as file:
        told = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        process = subprocess.Popen(words, cwd=ROOT, env=told, stdout=file, stderr=file)

    def until(true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not true():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    until(lambda: checkpoints(run) and (run / "ranks/00001.json").exists())
    workers = psutil.Process(process.pid).children()
    (stopped,) = [worker for worker in workers if worker.environ()["RANK"] == "1"]
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: "resuming tiny" in log.read_text())
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    before = checkpoints(run)[-1]
    until(lambda: checkpoints(run)[-1] > before)
    (run / "stop").touch()
    assert process.wait(300) == 0, log.read_text()
    text = log.read_text()
    assert f"rank 1 (process {stopped.pid} on" in text and "runs no more" in text, text
    assert f"Rank 0 ends with code {watchdog.EXIT_HUNG}" in text and "forcefully exiting" not in text, text
    assert "stopped by its stop file" in text
    assert "pipeline/training/run.py" in (run / "ranks/00000.stack").read_text()
