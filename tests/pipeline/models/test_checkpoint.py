"""Checkpoints are there whole or not at all, the newest sound one is found, and a full disk costs nothing older."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.engine import State
from pipeline.models import checkpoint


def state(value: float) -> State:
    return State(
        {"encoder/weight": torch.full((3,), value), "decoder/bias": torch.zeros(2)},
        {"encoder/weight": torch.full((3,), -value)},
        {"encoder/weight/exp_avg": torch.full((3,), value / 2)},
    )


def test_what_was_written_is_read(tmp_path):
    path = checkpoint.write(tmp_path, 640, state(2.0), {"position": {"a": 1}})
    again, extra = checkpoint.read(path)
    assert extra["position"] == {"a": 1} and extra["images"] == 640
    for part in ("networks", "ema", "optimizers"):
        want, got = getattr(state(2.0), part), getattr(again, part)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    assert checkpoint.read_networks(path)["encoder"]["weight"].tolist() == [-2.0] * 3
    assert checkpoint.read_networks(path, ema=False)["encoder"]["weight"].tolist() == [2.0] * 3
    assert checkpoint.read_networks(path)["decoder"]["bias"].tolist() == [0.0] * 2, "what has no average is taken as it is"


@pytest.mark.parametrize("name", ["networks.safetensors", "optimizers.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, caplog, name, harm):
    old = checkpoint.write(tmp_path, 10, state(1.0), {})
    new = checkpoint.write(tmp_path, 20, state(2.0), {})
    assert checkpoint.latest(tmp_path) == new
    content = (new / name).read_bytes()
    if harm == "remove":
        (new / name).unlink()
    elif harm == "cut":
        (new / name).write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        (new / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert checkpoint.latest(tmp_path) == old
    assert "the one before it is used" in caplog.text


def test_an_unfinished_one_is_never_found(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, 10, state(1.0), {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 20, state(2.0), {})
    assert [path.name for path in checkpoint.folder(tmp_path).iterdir()] == ["images-000000000010"]


def test_one_that_is_there_already_is_left_alone(tmp_path):
    path = checkpoint.write(tmp_path, 10, state(1.0), {"salt": 0})
    before = (path / "state.json").stat().st_ino
    checkpoint.write(tmp_path, 10, state(1.0), {"salt": 0})
    assert (path / "state.json").stat().st_ino == before
    checkpoint.write(tmp_path, 10, state(1.0), {"salt": 0}, {"valid/mse": 1.0})
    assert checkpoint.metrics_of(path) == {"valid/mse": 1.0}


def test_one_of_the_same_name_is_replaced_whole(tmp_path):
    checkpoint.write(tmp_path, 10, state(1.0), {})
    path = checkpoint.write(tmp_path, 10, state(3.0), {"salt": 1})
    checkpoint.check(path)
    assert checkpoint.read(path)[0].networks["encoder/weight"].tolist() == [3.0] * 3
    assert len(list(checkpoint.folder(tmp_path).iterdir())) == 1


def test_a_later_format_is_refused(tmp_path):
    path = checkpoint.write(tmp_path, 10, state(1.0), {})
    tree = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**tree, "format": 99}))
    with pytest.raises(ValueError, match="upgrade to use it"):
        checkpoint.read(path)
