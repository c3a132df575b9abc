"""Updates that are not finite: the run goes back to a checkpoint from before, sees other batches, and says so."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline import tracking
from pipeline.config import build
from pipeline.models import checkpoint
from pipeline.tracking.delivery import Child
from pipeline.training.run import train
from tests import going_back
from tests.warm import forked


@pytest.fixture(autouse=True)
def no_sender(monkeypatch):
    """Tracking writes its spool and starts no process."""
    monkeypatch.setattr(Child, "watch", lambda self: None)
    monkeypatch.setattr(Child, "wait", lambda self, seconds: None)


@pytest.fixture
def poisoned():
    with going_back.registered():
        yield


def test_it_goes_back_and_its_points_are_marked(faces, tmp_path, poisoned, caplog):
    run = tmp_path / "run"
    experiment = build(going_back.tree(faces, "tracked"), "test")
    train(experiment, run)
    assert "went back from 128 to 80 images, salt 1" in caplog.text
    points = [point for point in tracking.points(run) if point.name == "autoencoder/mse"]
    assert {point.step for point in points if point.superseded} == {96, 112}
    assert [point.step for point in points if not point.superseded] == [16, 32, 48, 64, 80, 96, 112, 128, 144, 160]
    waited = [point.value for point in tracking.points(run) if point.name == "run/waiting_share"]
    assert len(waited) >= 10 and all(0 < share < 1 for share in waited)
    events = [json.loads(line) for line in (run / "spool/main.jsonl").read_text().splitlines()]
    (tags,) = [event["tags"] for event in events if event["kind"] == "tags" and "rollbacks" in event["tags"]]
    assert tags["rollbacks"] == "1" and "were not finite" in tags["rollback.1"]
    state, extra = checkpoint.read(checkpoint.latest(run))
    assert extra["salt"] == 1 and extra["quarantine"] == []
    assert all(value.isfinite().all() for value in state.networks.values())


def test_without_a_checkpoint_it_begins_again(faces, tmp_path, poisoned, caplog):
    run = tmp_path / "run"
    train(build(going_back.tree(faces, "early", run={"checkpoint_images": 0}), "test"), run)
    assert "went back from 128 to 0 images" in caplog.text
    assert checkpoint.images_of(checkpoint.latest(run)) == 160


def test_a_resume_keeps_the_salt(faces, tmp_path, poisoned, caplog):
    run = tmp_path / "run"
    train(build(going_back.tree(faces, "salted"), "test"), run)
    train(build(going_back.tree(faces, "salted", method={"images": 240}), "test"), run, resume=True)
    assert caplog.text.count("went back") == 1, "the salt that helped is still there"


def test_it_ends_with_an_error_after_a_set_number_of_times(faces, tmp_path, poisoned, caplog):
    run = tmp_path / "run"
    tree = going_back.tree(faces, "hopeless", method={"until_salt": 9}, run={"rollbacks": 2})
    with pytest.raises(FloatingPointError, match="after 2 returns"):
        train(build(tree, "test"), run)
    assert caplog.text.count("went back from 128 to 80") == 2
    assert checkpoint.images_of(checkpoint.latest(run)) == 80


def test_now_and_then_one_is_no_reason(faces, tmp_path, poisoned, caplog):
    tree = going_back.tree(faces, "patient", run={"nonfinite_updates": 10, "log_images": 160})
    train(build(tree, "test"), tmp_path / "run")
    assert "8 updates were not finite" in caplog.text and "went back" not in caplog.text


@pytest.mark.ranks
def test_two_ranks_go_back_together_though_one_alone_met_it(faces, tmp_path):
    """By DDP and by ZeRO-1: equal weights on both ranks, at the same salt."""
    forked("tests.going_back", faces, tmp_path, processes=2)
    for backend in ("ddp", "deepspeed"):
        first, second = (load_file(tmp_path / f"{backend}-{rank}.safetensors") for rank in range(2))
        assert int(first["salt"]) == int(second["salt"]) == 1
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert all(value.isfinite().all() for value in first.values())
