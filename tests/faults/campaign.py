"""Ends real training runs in every way there is, resumes each, and counts what came of it.

    python -m tests.faults.campaign OUT --set FACES                 short: what `make test` runs
    python -m tests.faults.campaign OUT --kills 200 --long          long: what `make faults` runs

OUT/faults.jsonl has a line a fault: where it landed, what was there before and after. OUT/summary.json has the counts.
The exit code is 0 when every promise held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.tracking import run_id_of
from pipeline.training import watchdog
from pipeline.training.interruption import EXIT_AGAIN
from tests.commands import ROOT, environment
from tests.faults.starts import Start, best_interval, recovery, share_on_steps, write_config
from tests.faults.training import (
    BATCH,
    STEPS_A_SAVE,
    Attempt,
    damaged,
    differences,
    experiment,
    names,
    newest,
    unfinished,
    weights,
)

SAVE_IMAGES = STEPS_A_SAVE * BATCH


class Campaign:
    """One run, ended again and again. Every fault is recorded, and every promise it breaks."""

    def __init__(self, out: Path, faces: Path, kind: str, seed: int, num_ranks: int = 1, **run: Any) -> None:
        self.out, self.faces, self.kind, self.num_ranks = out, faces, kind, num_ranks
        self.run = out / kind
        self.experiment = experiment(faces, **run)
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self.save_seconds = 0.02

    def start(self) -> Attempt:
        return Attempt(self.experiment, self.run, self.num_ranks)

    def record(self, fault: str, where: str, attempt: Attempt, **more: Any) -> None:
        """Hold the promises that every fault must leave whole."""
        after = newest(self.run)
        event = {
            "fault": fault, "where": where, "began_at": attempt.before, "first_step": attempt.board.first,
            "last_step": attempt.board.last, "newest_sound": after, "left": unfinished(self.run), **more,
        }  # fmt: skip
        promises = {
            "no state in place is damaged": not damaged(self.run),
            "no state is lost": after >= attempt.before,
            "it went on where it had stopped": attempt.board.first in (0, attempt.before + BATCH),
        }
        event["broken"] = [promise for promise, held in promises.items() if not held]
        self.broken += [f"{self.kind}, fault {self.counts.total()}: {promise}" for promise in event["broken"]]
        self.counts[f"{fault}: {where}"] += 1
        with (self.out / "faults.jsonl").open("a") as file:
            file.write(json.dumps({"kind": self.kind, **event}) + "\n")

    def promise(self, held: bool, what: str) -> None:
        if not held:
            self.broken.append(f"{self.kind}, fault {self.counts.total()}: {what}")

    # --- kill -9 ----------------------------------------------------------------------------------------------------

    def kill(self, aim: str) -> str:
        """One attempt, killed where `aim` says, if the aim is good; returns where it landed."""
        attempt = self.start()
        if aim == "start":
            time.sleep(self.random.uniform(0, 0.5))
        else:
            attempt.until_saved()  # so that every one of them has made progress
            if aim == "save":
                attempt.until(lambda: self._left("tmp"), "save", poll_seconds=0.001)
                time.sleep(self.random.uniform(0, self.save_seconds))
            else:
                attempt.until(lambda: not unfinished(self.run), "end of a save")
                time.sleep(self.random.uniform(0, 0.2))
        attempt.kill()
        codes = attempt.end()
        where = self._where(attempt)
        self.promise(codes == [-signal.SIGKILL] * self.num_ranks, f"it was no kill that ended it: {codes}")
        if aim != "start":
            self.promise(newest(self.run) > attempt.before, "no progress since the fault before")
        if aim == "save":
            self.save_seconds *= 1.1 if where == "inside a save" else 0.8
        self.record("kill -9", where, attempt)
        return where

    def _where(self, attempt: Attempt) -> str:
        """Read off what the killed process left, not off what was aimed at."""
        if self._left("tmp", "old"):
            return "inside a save"
        if self._left("gone"):
            return "removing an older one after a save"
        return "between saves" if attempt.board.last else "before the first step"

    def _left(self, *kinds: str) -> list[str]:
        return [left for left in unfinished(self.run) if left.startswith(kinds)]

    def kills(self, number: int, inside: int, between: int) -> None:
        """At least so many in all, inside and between; now and then one more while the run starts."""
        wanted = {"inside a save": inside, "between saves": between}
        while sum(self.counts.values()) < number or any(self.counts[f"kill -9: {w}"] < n for w, n in wanted.items()):
            done = sum(self.counts.values())
            assert done < 4 * number, f"the aim is too bad: {self.counts}"
            if done % 20 == 10:
                self.kill("start")
            short = {where: need - self.counts[f"kill -9: {where}"] for where, need in wanted.items()}
            share = inside / (inside + between)
            if min(short.values()) > 0 or max(short.values()) <= 0:
                aim = "save" if self.random.random() < 1.3 * share else "between"
            else:
                aim = "save" if short["inside a save"] > 0 else "between"
            self.kill(aim)
            if done % 10 == 0:
                print(f"{time.strftime('%H:%M:%S')} {self.kind}: {dict(self.counts)}", flush=True)

    # --- asked to end -----------------------------------------------------------------------------------------------

    def ask(self, how: str) -> None:
        """A signal or the stop file, at any step."""
        attempt = self.start()
        attempt.until(lambda: attempt.board.last, "first step")
        time.sleep(self.random.uniform(0, 0.3))
        if how == "stop file":
            (self.run / "stop").touch()
        else:
            os.kill(attempt.pids[0], getattr(signal, how))
        expected = 128 + getattr(signal, how) if how in ("SIGTERM", "SIGHUP") else EXIT_AGAIN
        codes = attempt.end()
        self.promise(codes == [expected] * self.num_ranks, f"exit codes {codes}")
        self.promise(newest(self.run) == attempt.board.last > attempt.before, "the last step is not the one it saved")
        self.record(how, "at a step", attempt)

    # --- started by the real command --------------------------------------------------------------------------------

    def start_command(self, *words: str, stdout: Any = None, store: str = "") -> Start:
        config = write_config(self.experiment, self.run, self.out / f"{self.kind}.yaml")
        return Start(self.run, [str(config), *words], self.num_ranks, stdout, store)

    def end_command(self, start: Start, fault: str, where: str) -> None:
        """It still trains; told to end, it ends with its last step saved."""
        start.until_saved()
        self.promise(start.end(signal.SIGTERM) == 128 + signal.SIGTERM, f"{fault}: it did not end as told; see {start.log}")
        self.promise(newest(self.run) > start.before, f"{fault}: no progress")
        self.record(fault, where, start)

    def close_pipe(self) -> None:
        """Who reads its output leaves while it trains, as `| head` does."""
        reader, writer = os.pipe()
        start = self.start_command(stdout=writer)
        os.close(writer)
        start.until(lambda: os.read(reader, 1), "word")
        os.close(reader)
        self.end_command(start, "closed pipe", "while it trained")

    def fill_log(self) -> None:
        """No byte of its output finds room."""
        with open("/dev/full", "w") as full:
            start = self.start_command(stdout=full)
            self.end_command(start, "log on a full disk", "from the start on")

    def start_a_second(self) -> None:
        """A second training in its folder is refused by name, and the first loses nothing."""
        first = self.start()
        first.until_saved()
        second = self.start_command()
        code = second.process.wait()
        said = second.log.read_text()
        named = f"belongs to process {first.pids[0]} on" in said
        self.promise(code == 2 and named, f"the second ended with {code}; see {second.log}")
        at = newest(self.run)
        first.until(lambda: names(self.run)[-1] > at, "checkpoint after the second one came")
        os.kill(first.pids[0], signal.SIGTERM)
        self.promise(first.end() == [128 + signal.SIGTERM], "the first did not end as told")
        self.promise(newest(self.run) == first.board.last, "the last step is not the one it saved")
        self.record("two owners", "the second is refused", first)

    def delete_run(self) -> None:
        """Its MLflow run is deleted while it trains; restored, it gets all points."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(store := f"sqlite:///{self.out}/mlflow.db")
        start = self.start_command("tracking.enabled=true", store=store)
        start.until_saved()
        start.until(lambda: (run_id := run_id_of(self.run)) and _points(client, run_id), "point", poll_seconds=0.5)
        run_id = run_id_of(self.run)
        client.delete_run(run_id)
        at = start.images()[-1]
        start.until(lambda: start.images()[-1] > at + 400 * BATCH, "steps after that")
        self.end_command(start, "MLflow run deleted", "while it trained")
        client.restore_run(run_id)
        subprocess.run([sys.executable, "-m", "launch.sync", str(self.run)], env=environment(MLFLOW_TRACKING_URI=store), check=True)
        last = max(point.step for point in _points(client, run_id))
        self.promise(last == newest(self.run), f"of {newest(self.run)} images the points reach {last}")

    # --- a disk that is full ----------------------------------------------------------------------------------------

    def fill_disk(self, kill: bool) -> None:
        """The disk is full for some saves; then there is room again, or the run is killed while it is full."""
        attempt = self.start()
        attempt.until_saved()
        said = attempt.log.read_text().count("checkpoint not saved")
        with (self.run / "other").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                pass
        attempt.until(lambda: attempt.log.read_text().count("checkpoint not saved") > said, "word of the full disk")
        there = newest(self.run)
        self.promise(there >= attempt.before > -1 and not damaged(self.run), "the older one is not intact")
        if not kill:
            (self.run / "other").unlink()
            attempt.until(lambda: names(self.run)[-1] > there, "save after there was room again")
        attempt.kill()
        attempt.end()
        (self.run / "other").unlink(missing_ok=True)
        self.record("disk full", "killed while it was full" if kill else "went on when there was room", attempt)

    # --- one rank of two --------------------------------------------------------------------------------------------

    def stop_a_rank(self) -> None:
        attempt = self.start()
        attempt.until_saved()
        time.sleep(self.random.uniform(0, 0.3))
        stopped = self.random.randrange(self.num_ranks)
        os.kill(attempt.pids[stopped], signal.SIGSTOP)
        others = [pid for pid in attempt.pids if pid != attempt.pids[stopped]]
        deadline = time.monotonic() + 120
        while not all(pid in attempt.codes for pid in others) and time.monotonic() < deadline:
            attempt.reap()
            time.sleep(0.01)
        codes = [attempt.codes.get(pid) for pid in others]
        attempt.kill()
        attempt.end()
        named = f"rank {stopped} (process {attempt.pids[stopped]} on" in attempt.log.read_text()
        self.promise(codes == [watchdog.EXIT_HUNG] * len(others), f"the watchdog did not end it: {codes}")
        self.promise(named, "the stopped rank is not named")
        self.record("SIGSTOP", f"rank {stopped} of {self.num_ranks}", attempt)

    def kill_a_rank(self) -> None:
        attempt = self.start()
        attempt.until_saved()
        time.sleep(self.random.uniform(0, 0.3))
        killed = self.random.randrange(self.num_ranks)
        attempt.kill([attempt.pids[killed]])
        codes = attempt.end()
        self.promise(all(codes), f"another rank thinks that all is well: {codes}")
        self.record("kill -9", f"rank {killed} of {self.num_ranks}", attempt)

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let the run end, and hold it against one that nobody disturbed and that saves at its end only."""
        images = newest(self.run) + SAVE_IMAGES
        whole = experiment(self.faces, images, log_images=0, checkpoint_images=0)
        for run in (self.run, self.out / f"{self.kind}-unbroken"):
            attempt = Attempt(whole, run, self.num_ranks)
            codes = attempt.end(seconds=3600)
            assert codes == [0] * self.num_ranks, f"exit codes {codes}; see {attempt.log}"
        different = differences(weights(self.run), weights(run))
        self.promise(not different, f"not the unbroken run's: {different[:5]}")
        print(f"{self.kind}: {images:,} images, {len(different)} tensors differ from the unbroken run's", flush=True)


def _points(client: Any, run_id: str) -> list[Any]:
    """Of the metric that each step has."""
    return client.get_metric_history(run_id, "autoencoder/mse")


def times(out: Path, faces: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """What a kill costs in time: of the shipped experiment of the faces, by its real command, on one rank and on two."""
    batch, shipped = 32, yaml.safe_load((ROOT / "configs/faces_fader.yaml").read_text())["run"]["checkpoint_images"]
    words = [str(ROOT / "configs/faces_fader.yaml"), f"data.path={faces}", "judge=[]", "method.images=10000000"]
    words += [f"run.log_images={batch}", "run.picture_images=0", "run.evaluate_images=0"]
    rows = []
    for ranks in (1, 2):
        row = recovery(out, words, ranks, kills, 25 * batch, random.Random(seed))
        cost = row["first_step"]["median"], row["step"], row["save"] or 0.0, batch
        best = best_interval(*cost)
        shares = {images: round(share_on_steps(*cost, images), 4) for images in sorted({best, 25 * batch, shipped, 64_000})}
        rows.append(row | {"best_interval": best, "share_on_steps": shares})
        print(f"{time.strftime('%H:%M:%S')} {rows[-1]}", flush=True)
    return rows


def campaign(out: Path, faces: Path, kills: int, seed: int, long: bool) -> dict[str, Any]:
    """Everything, or the short form. Returns the summary."""
    begin = time.monotonic()
    parts: list[tuple[Campaign, Callable[[Campaign], None]]] = []

    def one(part: Campaign) -> None:
        part.kills(kills, inside=kills // 4, between=kills // 2)
        for how in ("SIGTERM", "SIGHUP", "SIGUSR1", "stop file"):
            for _ in range(kills // 20 if long else 1):
                part.ask(how)
        for fault in (part.close_pipe, part.fill_log, part.start_a_second, part.delete_run) if long else ():
            for _ in range(max(1, kills // 60)):
                fault()
        part.finish()

    def disk(part: Campaign) -> None:
        part.run.mkdir(parents=True)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", part.run], capture_output=True)
        if mounted.returncode:
            print("disk full: no right to mount a small disk; tests/pipeline/models/test_checkpoint.py fills one in another way")
            return
        try:
            for number in range(kills // 20 if long else 2):
                part.fill_disk(kill=number % 2 == 1)
            part.finish()
        finally:
            subprocess.run(["umount", "-l", part.run], check=True)

    def two(part: Campaign) -> None:
        for _ in range(max(1, kills // 40)):
            part.stop_a_rank()
            part.kill_a_rank()
        part.finish()

    parts = [(Campaign(out, faces, "one-process", seed), one), (Campaign(out, faces, "full-disk", seed), disk)]
    if long:
        parts.append((Campaign(out, faces, "two-ranks", seed, 2, watchdog_minutes=0.05), two))
    for part, what in parts:
        what(part)
    counts = sum((part.counts for part, _ in parts), Counter())
    broken = [promise for part, _ in parts for promise in part.broken]
    summary = {"faults": dict(counts), "broken_promises": broken, "seconds": round(time.monotonic() - begin), "seed": seed}
    return summary | ({"times": times(out, faces, max(4, kills // 5), seed)} if long else {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", type=Path, help="a shard set of drawn faces; made when there is none")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", action="store_true", help="every kind of fault, and what kills cost in time")
    given = parser.parse_args()
    given.out.mkdir(parents=True)  # never over an earlier record
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs inherit it, and one that nohup told to ignore hang-ups trains on
    faces = given.set or given.out / "set"
    if not (faces / "dataset.json").exists():
        line = [sys.executable, "-m", "launch.prepare", "faces", str(faces), "--count", "120"]
        subprocess.run(line, check=True)
    summary = campaign(given.out, faces, given.kills, given.seed, given.long)
    (given.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))
    sys.exit(1 if summary["broken_promises"] else 0)


if __name__ == "__main__":
    main()
