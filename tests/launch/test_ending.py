"""A run that is asked to end saves, says how it ended, and goes on by the command that began it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT, as_rank, command, environment, free_port, interruptible
from tests.launch.test_train import CONFIG, checkpoints
from tests.warm import forked

EXIT_AGAIN = 75


@pytest.fixture(scope="module")
def config(tmp_path_factory, faces) -> Path:
    """A run that is long enough to be still there when it is asked to end."""
    path = tmp_path_factory.mktemp("config") / "long.yaml"
    text = CONFIG.replace("FACES", str(faces)).replace("PRECISION", "fp32")
    path.write_text(text.replace("images: 1200", "images: 200000").replace("checkpoint_images: 80", "checkpoint_images: 240"))
    return path


class Attempt:
    """One start of the same command, its launcher in a session of its own."""

    def __init__(self, config: Path, run: Path, processes: int) -> None:
        self.run, self.exit_file = run, run.parent / "exit"
        self.before = seen(run)
        words = command("launch.train", config, f"run.folder={run}", "--continue", processes=processes)
        self.log = run.parent / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(FADER_EXIT_FILE=str(self.exit_file)),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),  # a batch script's trap '' USR1
            )
        self.until(lambda: seen(run) > self.before, "a new checkpoint")
        self.workers = psutil.Process(self.process.pid).children() if processes > 1 else [psutil.Process(self.process.pid)]

    def until(self, true: Callable[[], object], what: str, running: bool = True) -> None:
        deadline = time.monotonic() + 300
        while not true():
            assert time.monotonic() < deadline, f"no {what}\n{self.log.read_text()}"
            assert not running or self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def ended(self) -> tuple[int, str | None]:
        """The exit code, and the one that the batch script reads."""
        try:
            code = self.process.wait(300)
        finally:
            for worker in self.workers:
                worker.kill() if worker.is_running() else None
        return code, self.exit_file.read_text().strip() if self.exit_file.exists() else None

    @property
    def stopped_by(self) -> str:
        (line,) = [line for line in self.log.read_text().splitlines() if line.startswith("stopped by ")]
        reason, _, rest = line.removeprefix("stopped by ").partition(" after ")
        assert seen(self.run) == int(rest.split()[0].replace(",", "")), "the step it stopped at is the one it saved"
        return reason


def seen(run: Path) -> int:
    """Images seen at the newest checkpoint, 0 without one."""
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("images-")) if found else 0


def test_one_process_ends_with_75_and_the_same_command_goes_on(config, tmp_path):
    run = tmp_path / "run"
    first = Attempt(config, run, 1)
    os.kill(first.process.pid, signal.SIGUSR1)
    assert first.ended() == (EXIT_AGAIN, "75")
    assert first.stopped_by == "SIGUSR1"
    stopped = seen(run)
    second = Attempt(config, run, 1)
    assert second.before == stopped and "resuming tiny" in second.log.read_text()
    (run / "stop").touch()
    assert second.ended() == (EXIT_AGAIN, "75")
    assert second.stopped_by == "its stop file"
    ended = seen(run)
    forked("launch.train", config, f"run.folder={run}", "--continue", f"method.images={ended}")
    assert seen(run) == ended and not (run / "stop").exists(), "the stop file of the attempt before is gone"


@pytest.mark.ranks
def test_two_ranks_agree_although_one_alone_heard_it(config, tmp_path):
    """A signal to one worker, which the launcher must take for a good end; a launcher that is gone; a terminal that is."""
    run = tmp_path / "run"
    first = Attempt(config, run, 2)
    os.killpg(first.process.pid, signal.SIGUSR1)  # the launcher ignores it, its workers have sessions of their own
    os.kill(first.workers[1].pid, signal.SIGUSR1)
    assert first.ended() == (0, "75")
    assert first.stopped_by == "SIGUSR1"
    second = Attempt(config, run, 2)
    assert len(second.workers) == 2
    second.process.kill()
    second.until(lambda: not any(worker.is_running() for worker in second.workers), "end of the workers", running=False)
    assert second.ended() == (-signal.SIGKILL, "143")
    assert second.stopped_by == "the end of its launcher"
    assert seen(run) > second.before
    third = Attempt(config, run, 2)
    os.killpg(third.process.pid, signal.SIGHUP)  # the launcher hands it on
    assert third.ended()[1] == "129" and third.stopped_by == "SIGHUP"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_variables_that_are_left_over_are_named_and_the_run_ends_when_told(config, tmp_path, number):
    words = command("launch.train", config, f"run.folder={tmp_path / 'run'}")
    left_over = environment(**as_rank(0, 2, free_port()))
    process = subprocess.Popen(
        words, cwd=ROOT, env=left_over, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=interruptible
    )
    line = next((line for line in iter(process.stdout.readline, "") if "waiting at" in line), "")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert "the environment says WORLD_SIZE=2" in line and "unset WORLD_SIZE" in line


def test_resume_and_continue_are_not_given_together(tmp_path):
    done = forked("launch.train", "--resume", tmp_path, "--continue", code=2)
    assert "give one of them" in done.stderr
