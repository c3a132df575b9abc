"""`fader sweep --slurm` on a real Slurm: a child a task, one of them asked to stop half-way, and the table behind them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.data.shards import ShardSet
from pipeline.models import checkpoint
from tests.commands import launch
from tests.launch.test_sweep import CONFIG
from tests.runs import JUDGE, make_run


@pytest.fixture
def config(tmp_path: Path, faces: Path) -> Path:
    attributes = ShardSet.open(faces).attributes
    judge = make_run(tmp_path / "judge", JUDGE, data={"path": str(faces)}, attributes=attributes)
    text = CONFIG.replace("FACES", str(faces)).replace("JUDGE", str(judge))
    (tmp_path / "tiny.yaml").write_text(text.replace("{experiment: sweeps}", "{enabled: false}"))
    return tmp_path / "tiny.yaml"


def test_an_array_trains_the_children_and_the_table_comes_behind_them(cluster, config, tmp_path):
    folder = tmp_path / "sweep"
    words = [config, "method.latent.weight=0,0.01", "method.images=12000", "--folder", folder, "--tables", "swap,fidelity"]
    done = launch(
        "launch.sweep", *words, "--slurm", "--sbatch", f"--output={cluster.folder}/job-%A-%a.log", **cluster.environment
    )
    array, table = re.search(r"array job (\d+), their table as job (\d+)", done.stdout).groups()
    first = folder / "latent.weight-0"
    cluster.until((first / "run.json").exists, 300, "the first child to begin", array, every=0.02)
    (first / "stop").touch()  # what a time limit's USR1 does, without waiting for one
    cluster.start_again(f"{array}_0")
    assert cluster.wait(table, 600) == "COMPLETED", cluster.output(array) + cluster.output(table)
    said = cluster.output(array)
    assert cluster.state(array) == "COMPLETED" and "it goes on when Slurm starts it again" in said, said
    assert "latent.weight-0 (1 of 2): resuming" in said
    for run in (first, folder / "latent.weight-0.01"):
        assert checkpoint.finished(run)
    drawn = (folder / "report" / "sweep-valid.md").read_text()
    assert "tiny sweep, valid split" in drawn and drawn.count(" 12,000 ") == 2


def test_children_in_jobs_of_their_own_need_a_judge(config, tmp_path):
    done = launch("launch.sweep", config, "seed=0,1", "judge=null", "--slurm", "--folder", tmp_path / "s", code=2)
    assert "need judges that are there" in done.stderr
