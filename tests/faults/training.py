"""Real training runs that can be ended by the hundred: forked from a process that has imported everything already."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.config import Experiment, build
from pipeline.models import checkpoint
from pipeline.training.interruption import Interrupted
from pipeline.training.loop import Progress
from pipeline.training.run import train
from tests import imported  # noqa: F401  here, once, what each run would import anew
from tests.commands import as_rank, free_port

BATCH = 8
STEPS_A_SAVE = 5
PATIENCE_SECONDS = 600.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def experiment(faces: Path, images: int = 10_000_000, **run: object) -> Experiment:
    """A small Fader run with dropout, moving average and flips, that saves every few steps and says each step."""
    settings = {
        "name": "fader", "preset": "small", "init_channels": 4, "max_channels": 16, "num_layers": 3,
        "images": images, "latent": {"weight": 0.01, "ramp_images": 1000, "hidden_channels": 16}, "ema_half_life": 200, "encoder_dropout": 0.1,
    }  # fmt: skip
    tree = {
        "name": "faults",
        "method": settings,
        "data": {"path": str(faces), "attributes": ["Smiling", "Blond_Hair"], "image_size": 32, "threads": 1},
        "batch_size": BATCH,
        "run": {"log_images": BATCH, "checkpoint_images": STEPS_A_SAVE * BATCH, "picture_images": 0, **run},
        "tracking": {"enabled": False},
    }
    return build(tree, "tests/faults")


class Board:
    """What a run says while it trains: images seen after its first step of this attempt, and after its last one so far."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)

    def watch(self, progress: Progress) -> None:
        first, _ = struct.unpack("qq", self._memory[:16])
        images = progress.clock.images
        self._memory[:16] = struct.pack("qq", first or images, images)

    @property
    def first(self) -> int:
        return struct.unpack("qq", self._memory[:16])[0]

    @property
    def last(self) -> int:
        return struct.unpack("qq", self._memory[:16])[1]


@dataclass
class Attempt:
    """One start of a run, on one rank or several. before: images at the newest sound checkpoint it could begin from."""

    experiment: Experiment
    run: Path
    num_ranks: int = 1
    before: int = 0
    board: Board = field(default_factory=Board)
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.run.with_suffix(".log")

    def __post_init__(self) -> None:
        self.before = newest(self.run)
        port = free_port() if self.num_ranks > 1 else 0
        self.pids = [self._fork(rank, port) for rank in range(self.num_ranks)]

    def _fork(self, rank: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(message)s", force=True)
            if self.num_ranks > 1:
                os.environ.update(as_rank(rank, self.num_ranks, port))
            train(self.experiment, self.run, resume=(self.run / "run.json").exists(), watch=self.board.watch)
            code = 0
        except Interrupted as stopped:
            code = stopped.reason.exit_code
        except BaseException:  # whatever it was, this process may not go on as a copy of its parent
            traceback.print_exc()
        finally:
            os._exit(code)

    def until(self, true: Callable[[], object], what: str, poll_seconds: float = 0.01) -> None:
        """Wait, as long as all ranks run."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            self.reap()
            assert not self.codes and time.monotonic() < deadline, f"no {what}; ended: {self.codes}; see {self.log}"
            time.sleep(poll_seconds)

    def until_saved(self) -> None:
        self.until(lambda: (found := names(self.run)) and found[-1] > self.before, "new checkpoint")

    def reap(self) -> None:
        for pid in [pid for pid in self.pids if pid not in self.codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)

    def end(self, seconds: float = PATIENCE_SECONDS) -> list[int]:
        """Wait until all ranks are gone; their exit codes."""
        deadline = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            self.reap()
            assert time.monotonic() < deadline, f"still running: {self.pids}, {self.codes}; see {self.log}"
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def kill(self, pids: Sequence[int] | None = None) -> None:
        for pid in self.pids if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def names(run: Path) -> list[int]:
    """Images seen at the checkpoints that are in place, unverified, oldest first."""
    return [checkpoint.images_of(path) for path in reversed(checkpoint.kept(run))]


def newest(run: Path) -> int:
    found = checkpoint.latest(run)
    return 0 if found is None else checkpoint.images_of(found)


def damaged(run: Path) -> list[str]:
    """What stands in place and does not hold what its digests say."""
    wrong = []
    for path in checkpoint.kept(run):
        try:
            checkpoint.check(path)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def unfinished(run: Path) -> list[str]:
    """What a save left behind when it was cut off: `.tmp` being written, `.old` being replaced, `.gone` being removed."""
    litter = [path for path in checkpoint.folder(run).glob(".images-*")]
    found = []
    for path in litter:
        with contextlib.suppress(FileNotFoundError):  # it was renamed or removed meanwhile, as its save went on
            found.append(f"{path.suffix[1:]}: {', '.join(sorted(part.name for part in path.iterdir())) or 'empty'}")
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint: networks, moving averages, optimizer moments."""
    folder = checkpoint.latest(run)
    assert folder is not None
    parts = sorted(folder.glob("*.safetensors"))
    return {f"{part.stem}:{key}": value for part in parts for key, value in load_file(part).items()}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    return sorted(key for key in one.keys() | other.keys() if key not in one or key not in other or not torch.equal(one[key], other[key]))
