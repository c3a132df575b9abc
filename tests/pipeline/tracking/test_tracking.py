"""Tracking that cannot hurt: the loop never waits and never fails, no point is lost, none counts twice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline import tracking
from pipeline.tracking import MlflowTracker, NodeTracker, Tracker, later, open_tracker
from pipeline.tracking.address import named
from pipeline.tracking.process import deliver_once, take_lock, try_to_deliver
from pipeline.tracking.sender import Sender
from pipeline.tracking.tracker import QUEUE_EVENTS
from tests.commands import environment
from tests.runs import make_store


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (300, 150), colour).save(out, "PNG")
    return out.getvalue()


def spooled(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "spool" / "main.jsonl").read_text().splitlines()]


class Delivery:
    """What `sync` says of what its child process answered."""

    def __init__(self, answer: dict) -> None:
        assert answer["problem"] is None
        self.run_id, self.uri = answer["run_id"], answer["uri"]


def quiet(run: Path) -> MlflowTracker:
    """A tracker that spools and delivers nothing."""
    return MlflowTracker(run, "experiment", "name", deliver=False)


def eventually(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


# --- who tracks -------------------------------------------------------------------------------------------------------


def test_only_the_main_rank_reports_and_only_when_asked(tmp_path):
    def kind(enabled, main, **more):
        return type(open_tracker(enabled, tmp_path / "run", "experiment", "name", main, **more))

    assert kind(True, True) is MlflowTracker
    assert kind(True, False) is Tracker
    assert kind(False, True) is Tracker
    assert kind(True, False, node="n1", local_main=True) is NodeTracker
    assert kind(True, False, node=None, local_main=True) is Tracker
    assert not list(tmp_path.iterdir()), "opening a tracker wrote something"


def test_the_tracker_that_keeps_nothing_takes_everything(tmp_path):
    tracker = Tracker()
    tracker.start(3)
    tracker.log({"a": 1.0}, 1, 1)
    tracker.params({})
    tracker.tags({})
    tracker.picture("a", b"", 1)
    tracker.artifact(tmp_path)
    tracker.rewound(0, "why")
    tracker.finish("FINISHED")


# --- the spool --------------------------------------------------------------------------------------------------------


def test_every_point_is_on_disk_with_its_own_time_and_step(tmp_path):
    tracker = quiet(tmp_path)
    tracker.start()
    before = time.time() * 1000
    for step in range(500):
        tracker.log({"mse": step / 2, "odd": float("nan")}, step * 32, step)
    after = time.time() * 1000
    tracker.finish("FINISHED")
    lines = [event for event in spooled(tmp_path) if event["kind"] == "metrics"]
    assert [(e["step"], e["updates"], e["metrics"]["mse"]) for e in lines] == [(s * 32, s, s / 2) for s in range(500)]
    times = [event["time"] for event in lines]
    assert before - 1 <= times[0] and times[-1] <= after + 1 and times == sorted(times)
    assert spooled(tmp_path)[0]["kind"] == "start" and spooled(tmp_path)[-1]["status"] == "FINISHED"


def test_a_value_that_is_no_number_costs_its_own_point_only(tmp_path, caplog):
    tracker = quiet(tmp_path)
    tracker.start()
    tracker.log({"good": 1.0, "bad": "text"}, 1, 1)
    tracker.picture(None, b"", 1)  # a caller's bug
    tracker.log({"good": 2.0}, 2, 2)
    tracker.finish("FINISHED")
    assert [point.value for point in tracking.points(tmp_path)] == [1.0, 2.0]
    assert "metric bad is left out" in caplog.text


def test_a_line_cut_short_by_a_crash_is_closed_off_and_passed_over(tmp_path):
    for value in (1.0, 2.0):
        tracker = quiet(tmp_path)
        tracker.start(images=int(value))
        tracker.log({"a": value}, int(value), 1)
        tracker.finish("KILLED")
        with (tmp_path / "spool" / "main.jsonl").open("a") as file:
            file.write('{"kind": "metrics", "ti')
    assert [point.value for point in tracking.points(tmp_path)] == [1.0, 2.0]


def test_points_past_a_restored_checkpoint_are_marked(tmp_path):
    def attempt(start, steps, rewound=None):
        tracker = quiet(tmp_path)
        tracker.start(images=start)
        for step in steps:
            tracker.log({"a": 1.0}, step, step)
        if rewound is not None:
            tracker.rewound(rewound, "not finite")
            tracker.log({"a": 2.0}, rewound + 1, 1)
        tracker.finish("KILLED")

    attempt(0, [10, 20, 30])
    attempt(20, [30, 40], rewound=35)
    found = [(point.step, point.superseded) for point in tracking.points(tmp_path)]
    assert found == [(10, False), (20, False), (30, True), (30, False), (40, True), (36, False)]
    starts = [event for event in spooled(tmp_path) if event["kind"] == "start"]
    assert [(event["attempt"], event["from"], event["step"]) for event in starts] == [(1, 0, 0), (2, 30, 20)]


def test_a_disk_that_refuses_costs_points_and_nothing_else(tmp_path, caplog):
    (tmp_path / "spool").write_text("a file where the folder should be")
    tracker = MlflowTracker(tmp_path, "experiment", "name")
    tracker.start()
    for step in range(QUEUE_EVENTS + 2000):
        tracker.log({"a": 1.0}, step, step)
    tracker.artifact(tmp_path / "gone")
    begin = time.monotonic()
    tracker.finish("FINISHED", wait_seconds=1.5)
    assert time.monotonic() - begin < 5
    assert tracker._queue.qsize() <= QUEUE_EVENTS and tracker._lost > 0
    assert "cannot be written" in caplog.text


def test_points_wait_in_memory_while_the_disk_is_full(tmp_path, caplog):
    blocked = tmp_path / "spool"
    blocked.write_text("")
    tracker = quiet(tmp_path)
    tracker.start()
    for step in range(100):
        tracker.log({"a": float(step)}, step, step)
    time.sleep(0.5)
    blocked.unlink()
    tracker.log({"a": 100.0}, 100, 100)
    tracker.finish("FINISHED")
    assert [point.value for point in tracking.points(tmp_path)] == list(range(101))
    assert "can be written again" in caplog.text


def test_a_run_without_a_spool_is_said_so(tmp_path):
    for use in (tracking.points, tracking.sync):
        with pytest.raises(ValueError, match="has no tracking spool"):
            use(tmp_path)
    assert tracking.undelivered(tmp_path) == 0 and tracking.run_id_of(tmp_path) is None


def test_addresses_are_kept_without_passwords(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert named("https://user:secret@host:5000/x") == "https://host:5000/x"
    assert named("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"


# --- a store in a file ------------------------------------------------------------------------------------------------

_TRAINER = """
import os, sys, time
from pipeline.tracking import MlflowTracker

run = sys.argv[1]
tracker = MlflowTracker(run, "faces", "first")
tracker.start()
tracker.params({"method": {"name": "fader", "lambda": 1e-4}, "long": "x" * 7000, "odd:key": [1, 2]})
tracker.tags({"commit": "c0ffee", "data_digest": "d"})
open(run + "/config.yaml", "w").write("name: first")
tracker.artifact(run + "/config.yaml")
tracker.artifact(run + "/gone")
tracker.picture("sliders", open(run + "/picture.png", "rb").read(), 320)
for step in range(50):
    tracker.log({"autoencoder/mse": 1 / (step + 1), "bad": float("nan")}, step * 32, step)
while not os.path.exists(run + "/spool/state.json"):
    time.sleep(0.1)
time.sleep(1.5)
os.kill(os.getpid(), 9)
"""


def test_a_run_killed_and_resumed_is_one_run_with_every_point_once(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    run, uri = tmp_path / "run", make_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run.mkdir()
    (run / "picture.png").write_bytes(png())
    done = subprocess.run([sys.executable, "-c", _TRAINER, str(run)], env=environment(), cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    client = MlflowClient(uri)
    eventually(lambda: tracking.undelivered(run) == 0, 60, "the sender delivers what the dead trainer spooled")
    run_id = tracking.run_id_of(run)
    eventually(lambda: client.get_run(run_id).info.status == "KILLED", 30, "the run is marked as killed")

    found = client.get_run(run_id)
    assert found.info.run_name == "first" and client.get_experiment(found.info.experiment_id).name == "faces"
    assert found.data.params["method.name"] == "fader" and found.data.params["method.lambda"] == "0.0001"
    assert len(found.data.params["long"]) == 6000 and found.data.params["odd_key"] == "[1, 2]"
    assert found.data.tags["commit"] == found.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert [item.path for item in client.list_artifacts(run_id)] == ["config.yaml", "images"]
    assert len(client.list_artifacts(run_id, "images")) == 2, "the picture and its thumbnail"
    assert any(name.startswith("system/cpu") for name in found.data.metrics), "no system metrics"
    history = client.get_metric_history(run_id, "autoencoder/mse")
    logged = {(e["step"], e["time"], e["metrics"]["autoencoder/mse"]) for e in spooled(run) if e["kind"] == "metrics"}
    assert {(m.step, m.timestamp, m.value) for m in history} == logged and len(history) == 50
    state = json.loads((run / "spool" / "state.json").read_text())
    assert state["targets"][uri]["refused"] == 1, "the file that is gone"

    # resumed from a checkpoint at 800 images, with another λ
    tracker = MlflowTracker(run, "faces", "first")
    assert tracking.run_id_of(run) == run_id
    tracker.start(images=800)
    tracker.params({"method": {"name": "fader", "lambda": 2e-4, "new": 1}})
    tracker.log({"autoencoder/mse": 7.0}, 832, 26)
    tracker.picture("sliders", png(), 320)
    tracker.finish("FINISHED", wait_seconds=60)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and len(client.search_runs([found.info.experiment_id])) == 1
    assert found.data.params["method.lambda"] == "0.0001" and found.data.params["method.new"] == "1"
    assert found.data.tags["changed.method.lambda"] == "0.0001 -> 0.0002 at 800 images"
    [mark] = [json.loads(value) for key, value in found.data.tags.items() if key.startswith("rewound.")]
    assert (mark["from_images"], mark["to_images"]) == (1568, 800)
    assert [m.value for m in client.get_metric_history(run_id, "run/attempt")] == [1, 2]

    # everything a second time, and to a second store
    count = len(client.get_metric_history(run_id, "autoencoder/mse"))
    again = deliver_once(run / "spool", again=True)  # what `sync` asks its child process to do
    assert again["run_id"] == run_id and again["sent"] > 50 and again["problem"] is None
    assert len(client.get_metric_history(run_id, "autoencoder/mse")) == count == 51
    assert len(client.list_artifacts(run_id, "images")) == 4, "two pictures, logged at two times, each once"
    assert client.get_run(run_id).info.status == "FINISHED"
    (tmp_path / "other").mkdir()
    other = make_store(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    copied = deliver_once(run / "spool", again=False)
    assert copied["run_id"] != run_id and copied["uri"] == other
    assert len(MlflowClient(other).get_metric_history(copied["run_id"], "autoencoder/mse")) == 51
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.run_id_of(run) == copied["run_id"], "without the variable: where it went last"


def test_an_event_the_store_never_takes_does_not_hold_up_the_others(tmp_path, monkeypatch):
    """An artifact store without rights is given up on after five tries; one that is not there now is not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_store(tmp_path))
    monkeypatch.chdir(tmp_path)
    tracker = quiet(tmp_path)
    tracker.start()
    (tmp_path / "file").write_text("x")
    tracker.artifact(tmp_path / "file")
    tracker.log({"a": 1.0}, 1, 1)
    tracker.finish("FINISHED")
    sender = Sender(tmp_path / "spool")

    def fails(error):
        def log_artifact(*_):
            raise error

        monkeypatch.setattr(sender._client, "log_artifact", log_artifact)
        return try_to_deliver(tmp_path / "spool", sender)[1]

    for _ in range(10):
        assert "connection refused" in fails(RuntimeError("[Errno 111] Connection refused"))
    problems = [fails(RuntimeError("access denied")) for _ in range(5)]
    assert all("access denied" in problem for problem in problems[:4]) and problems[4] is None
    assert sender.state.refused == 1 and tracking.undelivered(tmp_path) == 0
    assert [m.value for m in sender._client.get_metric_history(tracking.run_id_of(tmp_path), "a")] == [1.0]


def test_what_is_added_later_changes_neither_status_nor_points(tmp_path, monkeypatch):
    """Evaluated twice at a checkpoint before the run's last point: every number and file once, the run as it was."""
    from mlflow import MlflowClient

    uri = make_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    # in this process: the child's start takes seconds, and other tests try it
    monkeypatch.setattr(later, "sync", lambda run: Delivery(deliver_once(run / "spool", False)))
    run = tmp_path / "run"
    tracker = quiet(run)
    tracker.start()
    for step in (10, 20, 30):
        tracker.log({"mse": 1.0}, step, step)
    tracker.finish("FAILED")
    page = run / "report" / "page.html"
    page.parent.mkdir()
    page.write_text("first")

    def add(files=(page,)):
        return tracking.add(run, {"test/swap_accuracy": 0.9}, 20, files=files)

    first = add()
    client = MlflowClient(uri)
    assert (first.spooled, first.problem) == (2, None) and first.run_id == tracking.run_id_of(run)
    found = client.get_run(first.run_id)
    ended = found.info.end_time
    assert found.info.status == "FAILED" and [p.path for p in client.list_artifacts(first.run_id, "report")]
    assert add().spooled == 0, "the same again is nothing new"
    page.write_text("second")
    assert add().spooled == 1, "a file that changed is sent again"
    [point] = client.get_metric_history(first.run_id, "test/swap_accuracy")
    assert (point.value, point.step) == (0.9, 20)
    found = client.get_run(first.run_id)
    assert (found.info.status, found.info.end_time) == ("FAILED", ended)
    assert not any(name.startswith("rewound.") for name in found.data.tags)
    assert found.data.metrics["test/swap_accuracy"] == 0.9

    tracker = quiet(run)  # resumed before the place where it was evaluated: only the loop's own points are superseded
    tracker.start(images=10)
    tracker.finish("FINISHED")
    assert [(p.step, p.superseded) for p in tracking.points(run)] == [(10, False), (20, True), (30, True)]
    start = [event for event in spooled(run) if event["kind"] == "start"][-1]
    assert (start["from"], start["step"]) == (30, 10), "the addition at 20 passed for the loop's last point"


def test_what_is_added_waits_for_a_trainer_at_work_and_for_a_store(tmp_path, monkeypatch):
    assert tracking.add(tmp_path, {"a": 1.0}, 1) is None and not list(tmp_path.iterdir()), "not tracked: nothing to do"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = quiet(tmp_path)
    tracker.start()
    tracker.finish("FINISHED")
    with pytest.raises(ValueError, match="not in the run's folder"):
        tracking.add(tmp_path, {}, 1, files=[__file__])
    held = take_lock(tmp_path / "spool", lambda: True)
    added = tracking.add(tmp_path, {"a": 1.0}, 1)
    os.close(held)
    assert added.spooled == 1 and "trainer is at work" in added.problem and tracking.undelivered(tmp_path) == 3


# --- a real server that goes away -------------------------------------------------------------------------------------


class Server:
    """`mlflow server` in a process group of its own, on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = make_store(folder)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        line += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts")]
        line += ["--workers", "1"]
        env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
        env.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            about = {"cwd": self.folder, "env": env, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(line, start_new_session=True, **about)
        eventually(self.answers, 180, "the MLflow server starts")

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        return False

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    yield server
    if server.process is not None and server.process.poll() is None:
        server.send(signal.SIGKILL)


def train(tracker: MlflowTracker, steps: range) -> list[float]:
    """Steps of some 3 ms that log; what each log and picture cost the loop, in seconds."""
    costs = []
    for step in steps:
        time.sleep(0.003)
        begin = time.perf_counter()
        tracker.log({f"autoencoder/loss{i}": float(step + i) for i in range(10)}, step * 32, step)
        costs.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    tracker.picture("sliders", png(), steps[-1] * 32)
    return [*costs, time.perf_counter() - begin]


def test_a_server_absent_stopped_and_killed_costs_no_time_and_no_point(server, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    client = MlflowClient(server.uri)
    costs: dict[str, list[float]] = {}

    def points(run: Path) -> list[tuple[int, int, float]]:
        found = client.get_metric_history(tracking.run_id_of(run), "autoencoder/loss3")
        return sorted((m.step, m.timestamp, m.value) for m in found)

    def logged(run: Path) -> list[tuple[int, int, float]]:
        return sorted((p.step, p.time, p.value) for p in tracking.points(run) if p.name == "autoencoder/loss3")

    # absent from the start, and when the run ends
    absent = tmp_path / "absent"
    tracker = MlflowTracker(absent, "faces", "absent")
    tracker.start()
    costs["absent"] = train(tracker, range(200))
    begin = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - begin < 45 and tracking.run_id_of(absent) is None
    with pytest.raises(ValueError, match="takes no points now .connection refused.*run 'fader sync' again"):
        tracking.sync(absent)
    server.start()
    delivery = tracking.sync(absent)
    assert delivery.refused == 0 and points(absent) == logged(absent) and len(points(absent)) == 200
    assert client.get_run(delivery.run_id).info.status == "FINISHED"
    assert client.get_run(delivery.run_id).info.start_time == spooled(absent)[0]["time"]

    # there, then stopped, then there again, then killed, then there again
    run = tmp_path / "run"
    tracker = MlflowTracker(run, "faces", "run")
    tracker.start()
    costs["there"] = train(tracker, range(100))
    eventually(lambda: tracking.run_id_of(run) and tracking.undelivered(run) == 0, 60, "a server that answers gets the points")
    server.send(signal.SIGSTOP)
    costs["stopped"] = train(tracker, range(100, 400))
    server.send(signal.SIGCONT)
    eventually(lambda: len(points(run)) == 400, 60, "points of the stop are replayed")
    server.send(signal.SIGKILL)
    costs["killed"] = train(tracker, range(400, 600))
    server.start()
    eventually(lambda: len(points(run)) == 600, 60, "points of the outage are replayed")
    tracker.finish("FINISHED", wait_seconds=60)
    assert points(run) == logged(run) and len(points(run)) == 600
    assert tracking.undelivered(run) == 0 and client.get_run(tracking.run_id_of(run)).info.status == "FINISHED"
    assert len(client.list_artifacts(tracking.run_id_of(run), "images")) == 6, "three pictures and their thumbnails"

    for state, seconds in costs.items():
        mean, median = statistics.mean(seconds), statistics.median(seconds)
        print(f"{state}: a log costs {1e6 * mean:.0f} us (median {1e6 * median:.0f}, worst {1e6 * max(seconds):.0f})")
        assert mean < 5e-3, f"{state}: a step costs {1e3 * mean:.2f} ms"


def test_other_nodes_spool_system_metrics_only(tmp_path, monkeypatch):
    run = tmp_path / "run"
    tracker = open_tracker(True, run, "faces", "name", main=False, node="n1", local_main=True)
    tracker.start()
    tracker.log({"a": 1.0}, 1, 1)
    try:
        path = run / "spool" / "system-n1.jsonl"
        eventually(lambda: path.exists() and path.stat().st_size, 60, "the node's sampler writes")
    finally:
        tracker.finish("FINISHED")
    event = json.loads(path.read_text().splitlines()[0])
    assert all(name.startswith("system/n1/") for name in event["metrics"])
    assert "system/n1/cpu_utilization_percentage" in event["metrics"]
    assert not (run / "spool" / "main.jsonl").exists()
    assert tracker._child._process.poll() is not None, "its process outlived the tracker"
