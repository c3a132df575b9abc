"""Stores and folders that are not as they were: copied, moved, deleted, misnamed; and passwords are written nowhere."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.tracking import MlflowTracker, later
from pipeline.tracking.address import check, without_password
from pipeline.tracking.process import deliver_once, try_to_deliver
from pipeline.tracking.spool import State
from tests.commands import environment
from tests.runs import make_store


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    uri = make_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def spool(run: Path, *values: float, images: int = 0) -> Path:
    """An attempt that logs these values and delivers nothing."""
    run.mkdir(exist_ok=True)
    tracker = MlflowTracker(run, "faces", "name", deliver=False)
    tracker.start(images)
    for step, value in enumerate(values, images + 1):
        tracker.log({"mse": value}, step, step)
    (run / "config.yaml").write_text("name: x")
    tracker.artifact(run / "config.yaml")
    tracker.finish("FINISHED")
    return run


def delivered(run: Path) -> str:
    answer = deliver_once(run / "spool", again=False)
    assert answer["problem"] is None and answer["refused"] == 0, answer
    return answer["run_id"]


def history(store: str, run_id: str) -> list[float]:
    import mlflow

    return [point.value for point in mlflow.MlflowClient(store).get_metric_history(run_id, "mse")]


# --- copied and moved -------------------------------------------------------------------------------------------------


def test_a_copied_folder_gets_a_run_of_its_own_with_all_its_points(store, tmp_path, caplog):
    first = spool(tmp_path / "first", 1.0, 2.0)
    first_id = delivered(first)
    second = Path(shutil.copytree(first, tmp_path / "second"))
    assert tracking.run_id_of(second) is None and tracking.undelivered(second) > 0
    spool(second, 3.0, images=2)
    assert f"{second} is a copy of {first}, so it gets an MLflow run of its own" in caplog.text
    second_id = delivered(second)
    assert second_id != first_id and history(store, first_id) == [1.0, 2.0] and history(store, second_id) == [1.0, 2.0, 3.0]
    assert delivered(second) == second_id == tracking.run_id_of(second), "and keeps it"
    spool(first, 4.0, images=2)
    assert delivered(first) == first_id and history(store, first_id) == [1.0, 2.0, 4.0]


def test_what_is_added_to_a_copy_later_goes_to_the_copys_run(store, tmp_path, monkeypatch):
    monkeypatch.setattr(later, "sync", lambda run: tracking.Delivery(store, delivered(run), 0, 0))
    first = spool(tmp_path / "first", 1.0)
    first_id = delivered(first)
    second = Path(shutil.copytree(first, tmp_path / "second"))
    added = tracking.add(second, {"mse": 9.0}, 1)
    assert added.run_id not in (None, first_id) and history(store, first_id) == [1.0]


def test_a_folder_that_was_moved_keeps_its_run(store, tmp_path, caplog):
    """Renamed; and moved to another disk, where only its old place tells."""
    run = spool(tmp_path / "run", 1.0)
    run_id = delivered(run)
    renamed = run.rename(tmp_path / "renamed")
    assert tracking.run_id_of(renamed) == run_id
    spool(renamed, 2.0, images=1)
    assert delivered(renamed) == run_id
    moved = Path(shutil.copytree(renamed, tmp_path / "elsewhere"))
    shutil.rmtree(renamed)
    assert delivered(moved) == run_id and "copy" not in caplog.text


def test_a_copy_on_another_machine_is_a_copy_but_not_the_same_path_there(store, tmp_path, monkeypatch):
    run = spool(tmp_path / "run", 1.0)
    run_id = delivered(run)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert State.read(run / "spool").run_id == run_id, "a folder that both see"
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    shutil.rmtree(run)
    assert State.read(copied / "spool").run_id is None


# --- deleted ----------------------------------------------------------------------------------------------------------


def test_a_deleted_run_waits_until_it_is_restored(store, tmp_path):
    import mlflow

    client, run = mlflow.MlflowClient(store), spool(tmp_path / "run", 1.0)
    run_id = delivered(run)
    client.delete_run(run_id)
    spool(run, 2.0, images=1)
    _, problem = try_to_deliver(run / "spool", None)
    assert "its run was deleted there" in problem and f"mlflow runs restore --run-id {run_id}" in problem
    assert State.read(run / "spool").problem == problem, "the trainer says it"
    answer = deliver_once(run / "spool", again=False)
    assert answer["problem"].startswith(problem) and "everything is kept" in answer["problem"]
    assert tracking.undelivered(run) > 0
    client.restore_run(run_id)
    assert delivered(run) == run_id and history(store, run_id) == [1.0, 2.0] and tracking.undelivered(run) == 0


def test_a_deleted_experiment_waits_too_before_its_first_run_and_after(store, tmp_path):
    import mlflow

    client = mlflow.MlflowClient(store)
    number = client.create_experiment("faces")
    client.delete_experiment(number)
    run = spool(tmp_path / "run", 1.0)
    for values in ((), (2.0,)):
        spool(run, *values, images=1)
        _, problem = try_to_deliver(run / "spool", None)
        assert f"its experiment faces was deleted there: restore it by 'MLFLOW_TRACKING_URI={store} mlflow" in problem
        assert f"mlflow experiments restore --experiment-id {number}'" in problem
        client.restore_experiment(number)
        run_id = delivered(run)
        client.delete_experiment(number)
    assert history(store, run_id) == [1.0, 2.0]


def test_a_permission_that_is_missing_for_a_while_costs_no_point(store, tmp_path, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    run = spool(tmp_path / "run", 1.0)
    sender, _ = try_to_deliver(run / "spool", None)
    spool(run, 2.0, images=1)

    def denied(*_, **__):
        raise MlflowException("you may not", error_code=PERMISSION_DENIED)

    with monkeypatch.context() as patch:
        patch.setattr(sender._client, "log_batch", denied)
        problems = [try_to_deliver(run / "spool", sender)[1] for _ in range(7)]
    assert all("you may not" in problem for problem in problems)
    assert try_to_deliver(run / "spool", sender)[1] is None
    assert history(store, sender.state.run_id) == [1.0, 2.0] and sender.state.refused == 0


# --- misnamed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["localhost:5000", "127.0.0.1:5000", "mlflow.example.org", "mlflow.example.org:443/x", "tracker:80"])
def test_a_servers_address_without_http_is_refused_with_the_whole_one(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    _, problem = try_to_deliver(spool(tmp_path / "run", 1.0) / "spool", None)
    assert f"MLFLOW_TRACKING_URI is {uri}, which is no address: write http://{uri}" in problem


def test_what_is_an_address_or_a_folder_is_none_of_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.runs").mkdir()
    for uri in ("", "http://h:5000", "sqlite:///x.db", "file:x", "databricks", "databricks://p", "my.runs", "/a/b.c", "mlruns"):
        check(uri)


def test_the_remedy_of_a_long_message_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    _, problem = try_to_deliver(spool(tmp_path / "run", 1.0) / "spool", None)
    assert "maintenance mode" in problem and "MLFLOW_ALLOW_FILE_STORE=true" in problem


# --- passwords --------------------------------------------------------------------------------------------------------

_SECRET = "s3cret-w0rd"
_TRAIN = """
import sys
from pipeline.tracking import MlflowTracker
tracker = MlflowTracker(sys.argv[1], "faces", "name")
tracker.start()
tracker.log({"mse": 1.0}, 1, 1)
tracker.finish("FINISHED", wait_seconds=60)
"""


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A server that refuses everything, and repeats in its answer what it was asked with."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(f"no: http://me:{_SECRET}@here{self.path}".encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["nobody there", "refusing", "with an @ in it", "no such driver", "in the query"])
def test_no_password_is_written_anywhere(tmp_path, kind):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1] if kind == "refusing" else 9
    secret = f"p@{_SECRET}" if "@" in kind else _SECRET
    scheme = "postgresql" if "driver" in kind else "http"
    extra = {"MLFLOW_TRACKING_URI": f"{scheme}://me:{secret}@127.0.0.1:{port}/x"}
    if "query" in kind:
        extra = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}/x?user=me&password={secret}&access_token={secret}"}
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", _TRAIN, run], env=environment(**extra), capture_output=True, text=True)
    synced = subprocess.run(
        [sys.executable, "-m", "launch.sync", run], env=environment(**extra), capture_output=True, text=True
    )
    server.shutdown()
    assert done.returncode == 0 and synced.returncode == 2 and "everything is kept in" in synced.stderr
    texts = {str(path): path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()}
    texts |= {"trainer": done.stdout + done.stderr, "sync": synced.stdout + synced.stderr}
    assert (run / "spool" / "sender.log").stat().st_size, "there is something to look at"
    assert [name for name, text in texts.items() if _SECRET in text] == []


def test_an_address_is_shown_without_its_password(monkeypatch):
    assert without_password("see http://me:a@b:1/x and sqlite:///y@z") == "see http://b:1/x and sqlite:///y@z"
    assert without_password("http://b/x?user=me&password=a%2Fb&mode=1: no") == "http://b/x?user=me&password=***&mode=1: no"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p%40ss%2Fw@h")
    assert without_password("no login with p@ss/w or p%40ss%2Fw at me:p%40ss%2Fw@h/x") == "no login with *** or *** at h/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa/ss@h")
    assert "pa/ss" not in without_password("cannot parse http://me:pa/ss@h/api, host me:pa/ss@h") and os.environ
