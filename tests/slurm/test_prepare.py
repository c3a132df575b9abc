"""launch/slurm/prepare.sbatch on a real Slurm: an array of tasks and a finisher write the set of one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import prepare
from tests.launch.test_prepare import contents

SCRIPT, TASKS = "launch/slurm/prepare.sbatch", 3


@pytest.fixture
def words(faces: Path, tmp_path: Path) -> tuple[str, ...]:
    """The drawn faces in CelebA's format, cut finely."""
    return ("celeba", str(faces / "source"), str(tmp_path / "set"), "--shard-records", "16", "--workers", "1")


def test_an_array_of_tasks_and_a_finisher_write_the_bytes_of_one_command(cluster, faces, words, tmp_path):
    array = cluster.submit(SCRIPT, *words, array=f"0-{TASKS - 1}")
    last = cluster.submit(SCRIPT, "--finish", *words, dependency=f"afterany:{array}")
    assert cluster.wait(last) == "COMPLETED", cluster.output(array) + cluster.output(last)
    assert cluster.state(array) == "COMPLETED"
    for task in range(TASKS):
        assert f"task {task} of {TASKS} wrote" in cluster.output(array)
    one = prepare(read_celeba(faces / "source"), tmp_path / "one", shard_records=16, workers=1)
    assert f"data digest {one.digest[:16]}" in cluster.output(last)
    assert contents(tmp_path / "set") == contents(one.path)


def test_the_finisher_names_a_task_that_failed(cluster, words, tmp_path):
    lone = cluster.submit(SCRIPT, "--task", 0, "--tasks", 2, *words)
    last = cluster.submit(SCRIPT, "--finish", *words, dependency=f"afterany:{lone}")
    assert cluster.wait(last) == "FAILED"
    assert cluster.state(lone) == "COMPLETED"
    assert "task 1 of 2: " in cluster.output(last) and "task 0 of 2: " not in cluster.output(last)
    assert not (tmp_path / "set/dataset.json").exists()
