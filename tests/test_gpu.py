"""`make gpu` on a machine without a GPU: what it would run is said, can be imported, and is tried on the CPU where it can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import config
from tests import gpu
from tests.commands import ROOT, environment
from tests.without import hide

HIDDEN = ("mlflow", "attribute-sliders", "scipy", "sklearn", "cv2", "onnx", "onnxruntime", "pandas")
ALL = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def test_all_tests_marked_gpu_are_known(request):
    """`make gpu` collects only these files, because others may import what is not installed beside a GPU."""
    marked = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    assert marked <= set(gpu.marked_files())


def run(folder: Path, *line: str) -> str:
    """What an interpreter prints that sees neither MLflow nor other packages that a machine with a GPU may lack."""
    hidden = hide(folder / "hidden", *HIDDEN)
    done = subprocess.run(
        [sys.executable, *line], cwd=ROOT, env=environment(PYTHONPATH=f"{hidden}:{ROOT}"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_cells_and_the_marked_tests_import_neither_mlflow_nor_the_installed_package(tmp_path):
    said = run(tmp_path, "-m", "tests.gpu", "--dry-run")
    assert all(f"  {name} (at most" in said for name in gpu.CELLS)
    assert "test_augmentation.py::test_on_another_device_as_on_the_cpu[cuda]" in said


def test_what_the_cells_call_runs_without_mlflow_and_the_installed_package(tmp_path, faces):
    small = ("data.image_size=32", "method.images=32", "method.init_channels=4", "method.max_channels=8")
    trained = ("judge=null", "run.evaluate_images=0", f"data.path={faces}", f"run.folder={tmp_path}/run", "tracking.enabled=false")
    lines = [
        ["launch.train", "configs/faces_fader.yaml", *small, *trained],
        ["launch.evaluate", f"{tmp_path}/run", "--tables", "fidelity,leak", "--limit", "8", "--json", f"{tmp_path}/tables.json"],
    ]
    run(tmp_path, "-c", ALL, json.dumps(lines))
    assert json.loads((tmp_path / "tables.json").read_text())["metrics"]


def test_the_settings_of_the_cells_are_settings_of_the_configs():
    for name, words in (("judge", gpu.SWEEP), ("fader", gpu.SWEEP), ("fader", gpu.FP16)):
        assert config.load(ROOT / f"configs/faces_{name}.yaml", words).tracking.enabled is False


TINY = ("data.image_size=32", "method.init_channels=4", "method.max_channels=8", "method.num_layers=2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the cells themselves run")
def test_cells_run_on_the_cpu_when_they_are_made_small():
    rates = [
        gpu._training_rate("small", 32, 8, "fp32", seconds=0.2),
        gpu._augmentation_rate(16, 4, times=2),
        gpu._loading_rates(32, 60, 8, ("none", "host"), seconds=0.1),
        gpu._step_rates("eager,bare", "0.01", *TINY),
    ]
    for name in ("images/s", "cache none images/s", "cache host images/s", "eager", "bare"):
        assert all(row[name] > 0 for row in rates if name in row) and any(name in row for row in rates), (name, rates)
