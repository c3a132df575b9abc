"""The registry on a remote MLflow server of its own: another process, its own database and artifact root, and a password."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from pipeline import models
from pipeline.models import aliases
from tests.commands import environment, free_port
from tests.runs import FADER, JUDGE, make_run, make_store

PASSWORD = "correct-horse-battery"


SECURED = importlib.util.find_spec("flask_wtf") is not None  # mlflow[auth]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(its address, with user and password where MLflow can ask for them; its folder)."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    store = make_store(folder)
    line = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port), "--workers", "1"]
    line += ["--artifacts-destination", str(folder / "artifacts")]
    env = environment(MLFLOW_DISABLE_TELEMETRY="true", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    env.pop("MLFLOW_TRACKING_URI", None)
    if SECURED:
        config = Path(importlib.util.find_spec("mlflow").origin).parent / "server" / "auth" / "basic_auth.ini"
        own = config.read_text().replace("sqlite:///basic_auth.db", f"sqlite:///{folder}/auth.db")
        (folder / "auth.ini").write_text(own)
        line += ["--app-name", "basic-auth"]
        env |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
        env |= {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(line, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://{f'admin:{PASSWORD}@' if SECURED else ''}127.0.0.1:{port}", folder
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not answer:\n{log.read_text()}")


def test_a_run_is_registered_loaded_promoted_and_rolled_back(server, tmp_path, monkeypatch):
    address, folder = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "judge", JUDGE)
    run = make_run(tmp_path / "run", FADER, judge=str(tmp_path / "judge"))
    first, second = models.register(run, "faces"), models.register(run, "faces")
    assert (first.version, second.version) == (1, 2) and PASSWORD not in first.store
    assert list((folder / "artifacts").rglob("model.safetensors")), "the artifacts went elsewhere"
    loaded = models.load("models:/faces@challenger")
    assert loaded.card["registered"]["version"] == 2 and len(loaded.judges) == 1
    ours = models.load(run).method.networks["encoder"].state_dict()
    theirs = loaded.method.networks["encoder"].state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    aliases.promote("faces", 1, None, {"promotion.swap_accuracy": "0.9"})
    aliases.promote("faces", 2, 1, {})
    assert models.load("models:/faces@champion").card["registered"]["version"] == 2
    assert aliases.rollback("faces") == (2, 1) and aliases.champion_of("faces") == 1
    assert not [path for path in tmp_path.rglob("mlflow.db")], "something was written to a store here"


@pytest.mark.skipif(not SECURED, reason="mlflow[auth] is not installed, so the server asks for no password")
def test_a_wrong_password_is_one_clear_error_without_it(server, monkeypatch):
    address, _ = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace(PASSWORD, "wrong-secret"))
    with pytest.raises(ValueError, match="MLflow at http://") as refused:
        aliases.champion_of("faces")
    assert "wrong-secret" not in str(refused.value)
