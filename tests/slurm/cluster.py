"""A whole Slurm on this machine: munged, slurmctld and several slurmd of its own, on ports and in folders of its own.

    with Cluster(folder) as cluster:
        job = cluster.submit("launch/slurm/train.sbatch", config, nodes=2)
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)

Nothing of a Slurm that is installed or running here is read or touched, and everything ends with the block, or with the
process, however that ends. Each slurmd is a node of two processors and one GPU (a word: only /dev/null is behind it),
whatever the machine has. Works for root, and for anybody else for jobs of their own.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.commands import ROOT, environment

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"  # Debian keeps daemons off a user's path
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# pgid would miss the launcher's workers, which live in sessions of their own; clusters have cgroups, containers may not
ProctrackType=proctrack/linuxproc
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm and munge that are not installed."""
    return [name for name in NEEDED if shutil.which(name, path=_PLACES) is None]


class Cluster:
    """A running Slurm. folder: for its state and its jobs' outputs; its path must be short (a socket lies in it)."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{k}" for k in range(1, nodes + 1)]
        kept = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE"))}
        ours = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PLACES, "FADER_PYTHON": sys.executable}
        self.environment = kept | ours
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- jobs -------------------------------------------------------------------------------------------------------

    def submit(self, script: str | Path, *words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, **options: object) -> str:
        """sbatch. options: sbatch's long ones, nodes=2 as --nodes=2. Returns the job's number."""
        given = {"output": self.folder / "job-%A-%a.log", **options}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        line = ["sbatch", "--parsable", *flags, str(script), *map(str, words)]
        return self._run(line, cwd=cwd, env=env).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, …: of an array the states of all its tasks, joined by commas."""
        lines = self._run(["squeue", "--noheader", "--array", "--states=all", "--format=%T", f"--jobs={job}"])
        return ",".join(sorted(set(lines.split())))

    def wait(self, job: str, seconds: float = 300) -> str:
        """The job's state when it, or every task of it, is over."""
        return self.until(lambda: self._over(job), seconds, f"job {job} to end", job)

    def until(
        self, true: Callable[[], object], seconds: float, what: str, job: str | None = None, every: float = 0.2
    ) -> Any:
        """What `true` returned once that is something. Raises TimeoutError with the job's output."""
        deadline = time.monotonic() + seconds
        while True:
            found = true()
            if found:
                return found
            if time.monotonic() > deadline:
                said = f"\n{self.state(job)}\n{self.output(job)}" if job else ""
                raise TimeoutError(f"waited {seconds:g} s for {what}{said}")
            time.sleep(every)

    def output(self, job: str) -> str:
        """What the job, or all tasks of it, wrote so far. job: its number, or ARRAY_TASK."""
        number, _, task = job.partition("_")
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"job-{number}-{task or '*'}.log")))

    def seconds(self, job: str) -> float:
        """For how long the job has been running, this time."""
        began = self._run(["squeue", "--noheader", "--format=%S", f"--jobs={job}"]).strip()
        return time.time() - time.mktime(time.strptime(began, "%Y-%m-%dT%H:%M:%S"))

    def queue(self) -> str:
        """squeue: what is waiting or running; empty when nothing is."""
        return self._run(["squeue", "--noheader"]).strip()

    def control(self, *words: str) -> str:
        """scontrol."""
        return self._run(["scontrol", *words])

    def start_again(self, job: str, *changes: str) -> None:
        """Start a job that was put back into the queue; Slurm itself lets two minutes pass. changes: more of scontrol's."""
        self.until(lambda: self.state(job) == "PENDING", 180, "the job to wait in the queue again", job)
        time.sleep(2)  # credentials made in the second in which the old one was revoked count as revoked, too
        self.control("update", f"JobId={job}", "StartTime=now", *changes)

    def processes(self, job: str, module: str = "launch.train") -> list[psutil.Process]:
        """The job's processes that run `python -m MODULE` on any node: the workers, not the launchers above them."""
        found = []
        for process in self._processes():
            try:
                words = process.cmdline()
                ours = words[1:3] == ["-m", module] or words[1:4] == ["-u", "-m", module]
                if ours and process.environ().get("SLURM_JOB_ID") == job:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _over(self, job: str) -> str:
        state = self.state(job)
        return state if state and all(part in _OVER for part in state.split(",")) else ""

    def _run(self, line: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            line, cwd=cwd, env=self.environment | (env or {}), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(line)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    # --- daemons ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *self.nodes):
            (self.folder / name).mkdir(exist_ok=True)
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:1 State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:])
        ]
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(
                host=host, controller_port=ports[0], user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes)
            )
        )
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{len(self.nodes)}] Name=gpu File=/dev/null\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        paths = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")]
        logs = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("log-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", *paths, *logs)
        self.until((self.folder / "munge.socket").exists, 120, f"munged; see {self.folder}/munge.log")
        self._daemon("slurmctld", "-D", "-c")
        for name in self.nodes:
            self._daemon("slurmd", "-D", "-N", name)
        try:
            self.until(self._ready, 240, "all nodes to be idle")
        except TimeoutError as error:
            logs = (f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
            raise TimeoutError(f"{error}\n" + "\n".join(logs)) from None

    def _daemon(self, *words: str) -> None:
        with open(self.folder / f"{words[0]}.out", "ab") as out:
            line = ["setpriv", "--pdeathsig", "KILL", *words]
            self._daemons.append(
                subprocess.Popen(line, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            )

    def _ready(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.environment, capture_output=True, text=True
        )
        return done.returncode == 0 and done.stdout.split() == ["idle"] * len(self.nodes)

    def stop(self) -> None:
        """End every job, daemon and process of this cluster."""
        if len(self._daemons) > 1:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self.environment, capture_output=True)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                left = subprocess.run(["squeue", "--noheader"], env=self.environment, capture_output=True)
                if left.returncode or not left.stdout.strip():
                    break
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        for process in self._processes():
            process.kill()

    def _processes(self) -> Iterator[psutil.Process]:
        """Every process, beside this one, that lives in this cluster."""
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process
            except psutil.Error:
                continue


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now, below those that systems give to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(12000, 32000), 1000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports between 12000 and 32000")
