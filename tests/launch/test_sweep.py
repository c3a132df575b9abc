"""`fader sweep` as a user starts, stops and repeats it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.data.shards import ShardSet
from tests.commands import ROOT, command, environment, interruptible
from tests.runs import JUDGE, make_run, make_store
from tests.warm import forked

CONFIG = """
name: tiny
method: {name: fader, preset: small, init_channels: 4, max_channels: 8, num_layers: 3, images: 800,
         latent: {hidden_channels: 8, ramp_images: 200}}
data: {path: FACES, attributes: [Smiling, Blond_Hair], image_size: 32, threads: 1}
batch_size: 8
judge: JUDGE
run: {log_images: 80, checkpoint_images: 80, picture_images: 0}
tracking: {experiment: sweeps}
"""


@pytest.fixture
def config(tmp_path, faces) -> Path:
    attributes = ShardSet.open(faces).attributes
    judge = make_run(tmp_path / "judge", JUDGE, data={"path": str(faces)}, attributes=attributes)
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("FACES", str(faces)).replace("JUDGE", str(judge)))
    return tmp_path / "tiny.yaml"


def test_a_sweep_goes_on_where_it_was_broken_off_and_ends_with_a_table_a_plot_and_nested_runs(config, tmp_path):
    import mlflow

    folder, store = tmp_path / "sweep", make_store(tmp_path)
    words = [config, "method.latent.weight=0,0.01", "--folder", folder, "--tables", "swap,fidelity"]
    line = command("launch.sweep", *words)
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(MLFLOW_TRACKING_URI=store),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    first, second = folder / "latent.weight-0", folder / "latent.weight-0.01"
    deadline = time.monotonic() + 600
    while not list((second / "checkpoints").glob("images-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "the same command goes on with the sweep" in output, output
    done = forked("launch.sweep", *words, MLFLOW_TRACKING_URI=store)
    assert "latent.weight-0: trained already" in done.stdout and "latent.weight-0: evaluated already" in done.stdout
    assert "latent.weight-0.01 (2 of 2): resuming" in done.stdout
    drawn = (folder / "report" / "sweep-valid.md").read_text()
    assert "tiny sweep, valid split" in drawn and "MSE of λ = 0" in drawn and drawn.count("\n| ") >= 3
    assert (folder / "report" / "sweep-valid.png").read_bytes().startswith(b"\x89PNG")
    for run in (first, second):
        assert (run / "report" / "evaluation-valid-fidelity-swap.json").is_file()
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("sweeps").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs if run not in children]
    assert {run.info.run_name for run in children} == {"tiny latent.weight-0", "tiny latent.weight-0.01"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert "valid/mse" in children[0].data.metrics and parent.data.params["sweep.method.latent.weight"] == "('0', '0.01')"
    assert any(name.startswith("chosen/") for name in parent.data.metrics)
    done = forked("launch.sweep", config, "method.latent.weight=0,0.01", "method.images=900", "--folder", folder, code=2)
    assert "holds a run of other settings" in done.stderr
