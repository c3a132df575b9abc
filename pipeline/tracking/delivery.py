"""Start the sender process and watch it, as the child of a training process or of `sync`, which waits for its answer."""

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import ensure_home
from pipeline.tracking.spool import State, spool_of

logger = logging.getLogger(__name__)

# MLflow's own defaults wait 246 s for a server that is gone (7 retries) and 120 s for one that hangs. Delivery has its
# own patience, so one short try is right. Set for the sender process only, and only where the user has not set them.
_SENDER_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow reports its use to its makers; a training job should not
    "OMP_NUM_THREADS": "1",
}


class Child:
    """The sender process of a training process: it is started, and started again when it died."""

    def __init__(self, spool: Path, node: str | None, deliver: bool) -> None:
        self._spool, self._node, self._deliver = spool, node, deliver
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf
        self._starts = 0
        self._looked = time.monotonic()
        self._problem = False

    def watch(self) -> None:
        """Called often, by one thread. An OSError is reported, and the rest of the tracker goes on."""
        now = time.monotonic()
        ended = self._process is None or self._process.poll()
        if ended and now - self._started > 60 and self._starts < 10:
            if self._starts:
                log = self._spool / "sender.log"
                logger.warning("tracking: the sender process ended, see %s; starting it again", log)
            self._started, self._starts = now, self._starts + 1
            try:
                self._process = self._start()
            except OSError as error:
                logger.warning("tracking: no sender process (%s); points are kept in %s", error, self._spool)
        if self._deliver and now - self._looked > 10:
            self._looked = now
            self._report()

    def _report(self) -> None:
        try:
            problem = State.read(self._spool).problem
        except OSError:
            return  # told by whoever writes the spool
        if problem and not self._problem:
            logger.warning("tracking: %s; they are kept in %s and training goes on", problem, self._spool)
        elif self._problem and not problem:
            logger.warning("tracking: MLflow takes points again")
        self._problem = bool(problem)

    def _start(self) -> subprocess.Popen[bytes]:
        self._spool.mkdir(parents=True, exist_ok=True)
        with (self._spool / "sender.log").open("ab") as log:
            return subprocess.Popen(
                _command(self._spool, parent=os.getpid(), node=self._node, sample_only=not self._deliver),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer; the sender goes when its work is done
            )

    def wait(self, seconds: float) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self.wait(5)


def _command(spool: Path, **options: Any) -> list[str]:
    # -P keeps the working folder off the module path: a file there cannot stand in for a library's
    return [sys.executable, "-P", "-m", "pipeline.tracking.process", str(spool), json.dumps(options)]


def _environment() -> dict[str, str]:
    ensure_home()
    environment = _SENDER_ENVIRONMENT | dict(os.environ)
    ours = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([ours, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


@dataclass(frozen=True)
class Delivery:
    """What `sync` did. refused: events that the store does not take (see `spool/sender.log`)."""

    uri: str
    run_id: str
    sent: int
    refused: int


def sync(run: str | Path, again: bool = False) -> Delivery:
    """Deliver what is left of a run's spool, now; create the MLflow run if there is none. The store is MLFLOW_TRACKING_URI,
    else the one the run went to before, else MLflow's default. again: send everything.

    Raises ValueError: no spool; the run is being trained; or the store does not answer (everything is kept).
    """
    spool = spool_of(run)
    with (spool / "sender.log").open("ab") as log:
        done = subprocess.run(_command(spool, again=again), env=_environment(), stdout=subprocess.PIPE, stderr=log)
    lines = done.stdout.decode().splitlines()
    if done.returncode or not lines:
        raise ValueError(f"the sender process ended with code {done.returncode}; see {spool / 'sender.log'}")
    answer = json.loads(lines[-1])
    if problem := answer.pop("problem"):
        raise ValueError(problem)
    return Delivery(**answer)
