"""What `fader demo` prints as the next command is one that works."""

from __future__ import annotations

import shlex

import pytest

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


def reported(changed: dict[str, float | None]) -> dict:
    """A report that just holds, but for what is changed; None leaves a number out, as where no record has twins."""
    numbers: dict[str, float | None] = {}
    for name in demo.ASKED_FOR:
        numbers |= {f"judge_accuracy.{name}": 0.95, f"swap_accuracy.{name}": 0.80}
        numbers |= {f"twin_inside.{name}_{way}": 0.599 for way in ("0_to_1", "1_to_0")}
    numbers |= {"judge_accuracy.Beard": 0.5, "swap_accuracy.Beard": 0.1, "mse": 0.01, "psnr": 26.0}
    numbers |= changed
    truth = [{"attribute": name} for name in (*demo.ASKED_FOR, "Beard")]
    return {"metrics": {f"test/{name}": value for name, value in numbers.items() if value is not None}, "truth": truth}


def test_the_demo_holds_at_its_bounds_whatever_else_it_measures():
    passed, lines = demo._verdict(reported({}))
    assert passed and not any("short" in line for line in lines) and any(line.startswith("Beard") for line in lines)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("judge_accuracy.Smiling", 0.949),
        ("swap_accuracy.Wearing_Hat", 0.799),
        ("twin_inside.Blond_Hair_0_to_1", 0.6),
        ("twin_inside.Blond_Hair_1_to_0", 0.6),
        ("twin_inside.Smiling_1_to_0", None),
        ("swap_accuracy.Smiling", None),
    ],
)
def test_the_demo_is_short_when_one_number_is_or_is_missing(number, value):
    passed, lines = demo._verdict(reported({number: value}))
    [short] = [line for line in lines if "<- short" in line]
    assert not passed and short.split()[0] in number


def test_the_demo_is_short_without_any_twin():
    numbers = {f"twin_inside.{name}_{way}": None for name in demo.ASKED_FOR for way in ("0_to_1", "1_to_0")}
    passed, lines = demo._verdict(reported(numbers) | {"truth": []})
    assert not passed and sum("<- short" in line for line in lines) == len(demo.ASKED_FOR)
