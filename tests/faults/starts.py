"""Runs started by their real command, imports included: what a fault costs in seconds, and faults of streams and stores."""

from __future__ import annotations

import contextlib
import re
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import IO, Any

import psutil
import yaml

from pipeline.config import Experiment
from tests.commands import command, environment
from tests.faults.training import PATIENCE_SECONDS, damaged, names, newest

FAILURE_SECONDS = 300.0
_SEEN = re.compile(r"^ *([\d,]+) / [\d,]+ images ", re.MULTILINE)


@dataclass
class Start:
    """One `fader train CONFIG --continue`, on one rank or through `accelerate launch` on two.

    stdout: of the command, which is a log by default. store: MLflow's address.
    """

    run: Path
    words: list[str]
    num_ranks: int = 1
    stdout: int | IO[Any] | None = None
    store: str = ""
    before: int = 0
    board: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(first=0, last=0))

    def __post_init__(self) -> None:
        self.before, self.began = newest(self.run), time.monotonic()
        self._log = self.log.open("ab")
        self._offset = self._log.tell()
        out = self._log if self.stdout is None else self.stdout
        line = command("launch.train", *self.words, "--continue", processes=self.num_ranks)
        self.process = subprocess.Popen(line, env=environment(MLFLOW_TRACKING_URI=self.store), stdout=out, stderr=out, start_new_session=True)

    @property
    def log(self) -> Path:
        return self.run.with_suffix(".starts.log")

    def images(self) -> list[int]:
        """Images seen at each step that this start has told of."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return [int(number.replace(",", "")) for number in _SEEN.findall(file.read().decode(errors="replace"))]

    def until(self, true: Any, what: str, poll_seconds: float = 0.01) -> float:
        """Wait, as long as it runs; return the seconds since its start."""
        while not true():
            assert self.process.poll() is None, f"no {what}: it ended with {self.process.returncode}; see {self.log}"
            assert time.monotonic() - self.began < PATIENCE_SECONDS, f"no {what}; see {self.log}"
            time.sleep(poll_seconds)
        return time.monotonic() - self.began

    def until_saved(self) -> float:
        return self.until(lambda: (found := names(self.run)) and found[-1] > self.before, "new checkpoint")

    def end(self, number: int) -> int:
        """Send a signal (SIGKILL to all of its processes) and return the exit code."""
        if number == signal.SIGKILL:
            with contextlib.suppress(psutil.NoSuchProcess):
                started = psutil.Process(self.process.pid)
                for one in [*started.children(recursive=True), started]:  # a launcher's workers are in sessions of their own
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        code = self.process.wait(PATIENCE_SECONDS)
        self._log.close()
        return code


def write_config(experiment: Experiment, run: Path, path: Path) -> Path:
    """An experiment as a file that `fader train` takes, for this run's folder."""
    tree = experiment.to_dict()
    tree["run"]["folder"] = str(run)
    path.write_text(yaml.safe_dump(tree))
    return path


def recovery(out: Path, words: list[str], num_ranks: int, kills: int, interval: int, rng: Random) -> dict[str, Any]:
    """Kill a run at any moment between two saves, start it again, and time what that costs.

    Args:
        words: of `fader train`: a config and settings. Each step must be logged.
        interval: images between two checkpoints.

    Returns:
        seconds from each kill to the first step and to the first new one, seconds of a step, and what a save adds to one.
    """
    run = out / f"recovery-{num_ranks}"
    words = [*words, f"run.folder={run}", f"run.checkpoint_images={interval}"]
    first, new, steps, saving = [], [], [], []
    store = f"sqlite:///{out}/mlflow.db"
    start, reached = Start(run, words, num_ranks, store=store), 0
    for _ in range(kills + 1):
        first.append(start.until(start.images, "first step"))
        new.append(start.until(lambda: start.images()[-1] > reached, "new step"))
        settled = start.images()[-1] + interval
        start.until(lambda: start.images()[-1] >= settled, "steps")
        told, moments = start.images(), [time.monotonic()]
        until = time.monotonic() + rng.uniform(2, 8)
        while time.monotonic() < until:  # the moments of single steps
            seen = start.images()
            for images in seen[len(told) :]:
                moments.append(time.monotonic())
                (saving if (images - 1) // interval > (told[-1] - 1) // interval else steps).append(moments[-1] - moments[-2])
                told.append(images)
            time.sleep(0.002)
        assert start.process.poll() is None, f"it ended by itself; see {start.log}"
        start.end(signal.SIGKILL)
        reached, killed = start.images()[-1], time.monotonic()
        start = Start(run, words, num_ranks, store=store)
        start.began = killed
    start.end(signal.SIGKILL)
    assert not damaged(run), damaged(run)
    a_step = statistics.median(steps)
    return {
        "ranks": num_ranks, "kills": kills, "interval": interval,
        "first_step": _spread(first[1:]), "new_step": _spread(new[1:]), "step": a_step,
        "save": max(0.0, statistics.mean(saving) - a_step) if saving else None,
    }  # fmt: skip


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": round(statistics.median(ordered), 2), "p95": round(ordered[int(0.95 * (len(ordered) - 1) + 0.5)], 2)}


def share_on_steps(start: float, a_step: float, save: float, batch: int, interval: int) -> float:
    """Share of the time that goes to new steps, at one failure every 300 seconds.

    A failure costs the start and, on average, half an interval's steps; each interval costs a save.
    """
    steps = interval / batch * a_step
    left = FAILURE_SECONDS - start
    if steps > left:
        return 0.0  # no interval ends before the next failure
    return (left - steps / 2) / FAILURE_SECONDS * steps / (steps + save)


def best_interval(start: float, a_step: float, save: float, batch: int) -> int:
    """The interval, in whole steps, of the largest share."""
    return max((batch * n for n in range(1, 5000)), key=lambda images: share_on_steps(start, a_step, save, batch, images))
