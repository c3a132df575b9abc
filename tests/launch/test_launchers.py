"""Every launch file starts what it says, and the engine ends with the weights of one process on whatever it started.

one_node.yaml and cpu.yaml are what the other tests of two ranks start with.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import ranks
from tests.commands import ROOT, command, environment, free_port
from tests.pipeline.engine.test_ranks import TOLERANCE, State, distance, of
from tests.warm import forked


@pytest.fixture(scope="module")
def short() -> State:
    """Fader after five steps in one process, in float64: the launchers' runs are measured by it."""
    return ranks.run(ranks.Case("fader", steps=5))


@pytest.fixture(scope="module")
def taken_over(tmp_path_factory) -> dict[int, Path]:
    """What both DeepSpeed files' launchers wrote, by stage; they run beside each other."""
    folder, running = tmp_path_factory.mktemp("stages"), {}
    for stage in (1, 2):
        words = ["--config_file", f"launch/accelerate/deepspeed_zero{stage}.yaml"]
        running[stage] = start(command("tests.ranks", folder / str(stage), "one", launcher=words))
    for stage, process in running.items():
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, f"stage {stage}\n{output}"
    return {stage: folder / str(stage) for stage in running}


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2])
def test_the_launchers_back_end_is_taken_over(short, taken_over, stage):
    """By deepspeed_zero1.yaml and deepspeed_zero2.yaml."""
    for rank in range(2):
        found = load_file(taken_over[stage] / f"rank{rank}.safetensors")
        assert (int(found["world_size"]), int(found["stage"])) == (2, stage)
        assert distance(short, of(found, "deepspeed/fader")) < TOLERANCE["zero1"]


@pytest.mark.ranks
def test_two_launchers_with_the_same_command_are_one_run_of_four_ranks(short, tmp_path):
    """many_nodes.yaml as it stands; the port alone is another, so that tests may run beside each other."""
    words = ["--config_file", "launch/accelerate/many_nodes.yaml", "--main_process_port", str(free_port())]
    line = command("tests.ranks", tmp_path, "one", launcher=words)
    nodes = [start(line) for _ in range(2)]
    outputs = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    for rank in range(4):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        assert int(found["world_size"]) == 4
        for backend in ("ddp", "zero1"):
            assert distance(short, of(found, f"{backend}/fader")) < TOLERANCE["zero1"], backend


def test_deepspeed_needs_no_launcher(short, tmp_path):
    """One process by plain Python, the back end by the experiment."""
    forked("tests.ranks", tmp_path, "alone")
    found = load_file(tmp_path / "rank0.safetensors")
    assert int(found["world_size"]) == 1
    for backend in ("zero0", "zero1", "zero2"):
        assert distance(short, of(found, f"{backend}/fader")) < TOLERANCE[backend], backend
