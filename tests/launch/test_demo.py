"""What `fader demo` prints as the next command is one that works."""

from __future__ import annotations

import shlex

from launch import demo
from pipeline.data.shards import ShardSet
from tests.commands import launch
from tests.runs import FADER, make_run


def test_the_edit_that_it_prints_next_works_on_a_model_of_the_drawn_faces(faces, tmp_path):
    data = {"path": str(faces), "attributes": ["*"]}
    run = make_run(tmp_path / "run", FADER, data=data, attributes=ShardSet.open(faces).attributes)
    photo = next((faces / "source").rglob("*.jpg"))
    (line,) = (line for line in demo.next_commands(photo, str(run), tmp_path).splitlines() if "fader edit" in line)
    launch("launch.cli", *shlex.split(line)[1:], cwd=tmp_path)
    assert list((tmp_path / "edited").iterdir())
