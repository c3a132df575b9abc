"""`fader train` as a user starts, stops and resumes it: real processes, real signals, one and two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import load
from pipeline.ownership import owned
from pipeline.training.run import train
from tests.commands import ROOT, command, environment, interruptible
from tests.warm import forked

CONFIG = """
name: tiny
method: {name: fader, preset: small, init_channels: 4, max_channels: 16, num_layers: 3,
         images: 1200, latent: {weight: 0.01, ramp_images: 1000, hidden_channels: 16}, ema_half_life: 200, encoder_dropout: 0.1}
data: {path: FACES, attributes: [Smiling, Blond_Hair], image_size: 32, threads: 1,
       balance: {Smiling: 0.6, Eyeglasses: 0.3}, augment: {rotation_degrees: 5, translation: 0.03, hue: 0.02}}
batch_size: 8
precision: PRECISION
run: {log_images: 400, checkpoint_images: 80, picture_images: 0}
tracking: {enabled: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, faces) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG.replace("FACES", str(faces)).replace("PRECISION", "fp32"))
    return path


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("images-*"))


def final_state(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(run)[-1]
    assert last.name.endswith("1200"), last
    return {f"{part}:{k}": v for part in ("networks", "ema", "optimizers") for k, v in load_file(last / f"{part}.safetensors").items()}


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Callable[[int], dict[str, torch.Tensor]]:
    """The final state of a run nobody disturbs, by number of ranks."""

    @cache
    def state(processes: int) -> dict[str, torch.Tensor]:
        run = tmp_path_factory.mktemp("unbroken") / f"run{processes}"
        done = forked("launch.train", config, f"run.folder={run}", processes=processes)
        assert re.search(r"1,200 / 1,200 images +[\d,]+ images/s +0:00:00 left", done.stderr), done.stderr
        return final_state(run)

    return state


def break_off(config: Path, run: Path, processes: int, number: signal.Signals) -> str:
    """Start a run, wait for its first checkpoint, and send a signal to all its processes, as a terminal does."""
    words = command("launch.train", config, f"run.folder={run}", processes=processes)
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 300
    while not checkpoints(run):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    if number == signal.SIGKILL:  # the launcher's workers live in sessions of their own
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
    else:
        os.killpg(process.pid, number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0, output
    return output


@pytest.mark.parametrize(  # kill -9 of a rank of several: tests/faults and tests/slurm
    ("number", "processes"),
    [(signal.SIGINT, 1), (signal.SIGKILL, 1), pytest.param(signal.SIGINT, 2, marks=pytest.mark.ranks)],
    ids=["ctrl-c-1", "kill-9-1", "ctrl-c-2"],
)
def test_a_run_that_was_broken_off_ends_bit_for_bit_as_the_unbroken_one(config, unbroken, tmp_path, processes, number):
    run = tmp_path / "run"
    output = break_off(config, run, processes, number)
    assert not [path for path in checkpoints(run) if path.name.endswith("1200")], "it ended before the signal came"
    if number == signal.SIGINT:
        assert "Traceback" not in output or processes > 1, output  # the launcher of several ranks prints its own
        stopped = int(re.search(r"after ([\d,]+) images, state saved", output).group(1).replace(",", ""))
        assert f"fader train --resume {run}" in output
        assert checkpoints(run)[-1].name.endswith(f"{stopped:012d}"), "every image that was seen is in the checkpoint"
    alone = shutil.copytree(run, tmp_path / "alone")
    forked("launch.train", "--resume", run, processes=processes)
    resumed, whole = final_state(run), unbroken(processes)
    assert resumed.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []
    if processes > 1:
        _goes_on_with_one_rank(alone, whole)


def _goes_on_with_one_rank(run: Path, whole: dict[str, torch.Tensor]) -> None:
    """Another order of sums, so not the same bits; a copy of the broken run, moved."""
    forked("launch.train", "--resume", run, processes=1)
    resumed = final_state(run)
    assert resumed.keys() == whole.keys()
    weights = [key for key in whole if key.startswith("networks:") and whole[key].is_floating_point()]
    assert all(torch.isfinite(resumed[key]).all() for key in weights)
    assert json.loads((run / "run.json").read_text())["world_size"] == 1


def test_bf16_trains(config, tmp_path):
    done = forked("launch.train", config, f"run.folder={tmp_path / 'run'}", "precision=bf16", "method.images=400")
    assert "autoencoder/mse" in done.stderr
    state = load_file(checkpoints(tmp_path / "run")[-1] / "networks.safetensors")
    assert all(value.dtype != torch.bfloat16 for value in state.values()), "weights stay float32"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["CONFIG", "method.latent.wieght=1"], "did you mean method.latent.weight?"),
        (["CONFIG", "batch_size=big"], "batch_size"),
        (["CONFIG", "data.attributes=[Smilling]"], "did you mean 'Smiling'?"),
        (["CONFIG", "data.path=nowhere"], "nowhere"),
        (["CONFIG", "data.balance={Smiling: 1.5}"], "data.balance: Smiling asks for 1.5"),
        (["CONFIG", "judge=nowhere", "run.evaluate_images=100"], "nowhere"),
        (["CONFIG", "data.image_size=33"], "33"),
        (["nothing.yaml"], "no such config file"),
        (["--resume", "nowhere"], "holds no run to resume"),
        ([], "name a config file"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(config, tmp_path, words, says):
    words = [str(config) if word == "CONFIG" else word for word in words]
    if words and words[0] == str(config):
        words.append(f"run.folder={tmp_path / 'run'}")
    done = forked("launch.train", *words, code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "nothing half-written looks like a run"


WHAT_IT_IMPORTS = """
import runpy, sys
try:
    runpy.run_module("launch.train", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(*sorted({"torch._dynamo", "sympy", "mlflow"} & set(sys.modules)))
"""


def test_a_start_waits_for_no_compiler(config, tmp_path):
    words = ["-c", WHAT_IT_IMPORTS, str(config), f"run.folder={tmp_path / 'run'}", "method.images=80"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and checkpoints(tmp_path / "run"), done.stderr
    assert done.stdout.splitlines()[-1] == "", f"a training imported {done.stdout.splitlines()[-1]}"


def test_a_folder_that_holds_a_run_is_not_written_over(config, tmp_path):
    run = tmp_path / "run"
    forked("launch.train", config, f"run.folder={run}", "method.images=80")
    before = (run / "config.yaml").read_bytes()
    done = forked("launch.train", config, f"run.folder={run}", code=2)
    assert f"fader train --resume {run}" in done.stderr
    assert (run / "config.yaml").read_bytes() == before
    for others in ("[Blond_Hair, Smiling]", "[Smiling, Eyeglasses]"):  # networks of the same shape
        done = forked("launch.train", "--resume", run, f"data.attributes={others}", code=2)
        assert "learns Smiling, Blond_Hair, and" in done.stderr and (run / "config.yaml").read_bytes() == before
    done = forked("launch.train", "--resume", run, "seed=5", "method.images=160", code=2)
    assert f"error: {run} cannot go on with seed 5: its weights started from seed 0" in done.stderr
    assert (run / "config.yaml").read_bytes() == before and len(checkpoints(run)) == 1


def test_settings_that_the_first_update_refuses_leave_the_folder_as_it_was(config, tmp_path):
    run = tmp_path / "run"
    refused = forked("launch.train", config, f"run.folder={run}", "batch_size=1", code=2)
    assert "batch norm needs two values" in refused.stderr and not (run / "run.json").exists()
    forked("launch.train", config, f"run.folder={run}", "method.images=80")
    before = [(run / name).read_bytes() for name in ("config.yaml", "run.json")]
    forked("launch.train", "--resume", run, "method.images=160", "batch_size=1", code=2)
    assert [(run / name).read_bytes() for name in ("config.yaml", "run.json")] == before
    forked("launch.train", "--resume", run, "method.images=160")


def test_a_second_training_in_a_folder_is_refused_and_told_who_has_it(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for words in ([config, f"run.folder={run}", "method.images=80"], ["--resume", run]):
        with owned(run / "owner", str(run)):
            done = forked("launch.train", *words, code=2)
            assert f"error: {run} belongs to process {os.getpid()} on " in done.stderr
            assert (run / "owner").read_text(), "the first keeps its name there"
        forked("launch.train", *words)
    assert (run / "owner").read_text() == "", "it was given up at the end"


def test_a_run_that_was_taken_over_while_it_stood_still_saves_nothing(config, tmp_path):
    run = tmp_path / "run"
    experiment = load(config, [f"run.folder={run}", "run.log_images=8", "run.checkpoint_images=0"])
    taken = json.dumps({"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00", "token": "x"})
    with pytest.raises(ValueError, match="was taken over by process 7 on elsewhere"):
        train(experiment, run, watch=lambda progress: (run / "owner").write_text(taken))
    assert not checkpoints(run) and (run / "owner").read_text() == taken


def test_a_damaged_checkpoint_is_passed_over(config, unbroken, tmp_path):
    run = tmp_path / "run"
    break_off(config, run, 1, signal.SIGINT)
    forked("launch.train", "--resume", run, "method.images=900")
    damaged = checkpoints(run)[-1] / "networks.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = forked("launch.train", "--resume", run, "method.images=1200")
    assert "does not match its digest" in done.stderr
    resumed, whole = final_state(run), unbroken(1)
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []
