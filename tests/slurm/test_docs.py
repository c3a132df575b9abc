"""docs/cluster.md, typed by a new user: its block of commands, on a Slurm of four nodes, in a folder as a clone leaves it.

Pictures are the drawn faces, nodes have one GPU (which is none), and a few images replace many; the rest is as it stands.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

from tests.commands import ROOT, free_port

PAGE = ROOT / "docs/cluster.md"
FEW = (
    "data.attributes=[Smiling] data.image_size=32 precision=fp32 "
    "method.images=512 method.init_channels=4 method.max_channels=16"
)
UNTRACKED = "tracking.enabled=false"


def test_the_commands_of_the_page_lead_to_tables_of_a_run_on_four_nodes(cluster, faces, tmp_path):
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    for old, new in (
        ("/data/celeba", str(faces / "source")),
        ("--gpus-per-node=8", "--gpus-per-node=1"),
        ("configs/celeba_judge.yaml", f"configs/celeba_judge.yaml {FEW} method.hidden_channels=16 method.asked=[] {UNTRACKED}"),
        ("configs/celeba_residual_judge.yaml", f"configs/celeba_residual_judge.yaml {FEW} method.asked=[] {UNTRACKED}"),
        ("configs/celeba_fader.yaml", f"configs/celeba_fader.yaml {FEW} method.latent.hidden_channels=16 {UNTRACKED}"),
        ("tables=$(sbatch", "tables=$(FADER_PROCESSES_PER_NODE=2 sbatch"),
        ("runs/celeba_fader", "runs/celeba_fader --limit 8 --tables swap,cost"),
    ):
        assert old in block, f"{old} is no longer in {PAGE.name}: this test must follow"
        block = block.replace(old, new)
    for name in ("launch", "configs", "pipeline", "fader"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = {k: v for k, v in cluster.environment.items() if k != "FADER_PYTHON"} | {"FADER_PORT": str(free_port())}
    names = ("array", "finish", "judge", "residual", "train", "tables")
    script = f"set -eu\n{block}\necho jobs " + " ".join(f"${name}" for name in names)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    jobs = dict(zip(names, done.stdout.split("jobs ")[1].split()))
    logs = lambda: "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))  # noqa: E731
    assert cluster.wait(jobs["finish"], 120) == "COMPLETED", logs()
    assert cluster.wait(jobs["judge"]) == cluster.wait(jobs["residual"]) == "COMPLETED", logs()
    assert cluster.wait(jobs["train"]) == "COMPLETED", logs()
    assert cluster.wait(jobs["tables"]) == "COMPLETED", logs()
    assert json.loads((tmp_path / "runs/celeba_fader/run.json").read_text())["world_size"] == 4
    assert "node 3 of 4: " in (tmp_path / f"fader-train-{jobs['train']}.log").read_text()
    assert list((tmp_path / "runs/celeba_fader/report").glob("*.md")), logs()
