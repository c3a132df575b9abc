"""The short form of the fault figures: a real run ended in every way, each time resumed. `make faults` is the long form."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from pipeline.engine import State
from pipeline.models import checkpoint
from tests.commands import launch
from tests.faults.campaign import Campaign
from tests.faults.starts import best_interval, share_on_steps
from tests.faults.training import BATCH, differences


@pytest.fixture(scope="module")
def record(faces, tmp_path_factory):
    """The faults' records and the summary."""
    out = tmp_path_factory.mktemp("faults") / "out"
    launch("tests.faults.campaign", out, "--set", faces)
    events = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    return events, json.loads((out / "summary.json").read_text())


def test_no_promise_is_broken_and_the_weights_are_the_unbroken_runs(record):
    """The campaign itself exits with 1 otherwise; this holds its record against what it says."""
    events, summary = record
    assert summary["broken_promises"] == []
    assert sum(summary["faults"].values()) == len(events)
    assert not [event for event in events if event["broken"]]


def test_kills_landed_inside_saves_and_between_them_and_each_run_got_on(record):
    events, _ = record
    kills = [event for event in events if event["fault"] == "kill -9"]
    assert len(kills) >= 8
    assert sum(event["where"] == "inside a save" for event in kills) >= 2
    assert sum(event["where"] == "between saves" for event in kills) >= 4
    assert all(event["newest_sound"] > event["began_at"] for event in kills if event["where"] != "before the first step")


def test_every_kind_of_fault_was_tried(record):
    events, _ = record
    assert {event["fault"] for event in events} >= {"kill -9", "SIGTERM", "SIGHUP", "SIGUSR1", "stop file"}


@pytest.mark.parametrize("plant", ["nothing", "damaged", "lost", "elsewhere"])
def test_the_campaign_sees_what_it_is_for(tmp_path, plant):
    part = Campaign(tmp_path, tmp_path, "planted", 0)
    for images in (40, 80):
        checkpoint.write(part.run, images, State({"encoder/weight": torch.ones(3)}, {}, {}), {})
    attempt = SimpleNamespace(before=80, board=SimpleNamespace(first=80 + BATCH, last=80 + BATCH))
    if plant == "damaged":
        (checkpoint.at(part.run, 40) / "networks.safetensors").write_bytes(b"cut short")
    elif plant == "lost":
        shutil.rmtree(checkpoint.at(part.run, 80))
    elif plant == "elsewhere":
        attempt.board.first = 40 + BATCH
    part.record("kill -9", "between saves", attempt)
    expected = {"nothing": [], "damaged": ["damaged"], "lost": ["lost"], "elsewhere": ["where it had stopped"]}[plant]
    assert len(part.broken) == len(expected) and all(word in said for word, said in zip(expected, part.broken))


def test_the_share_of_time_on_steps_counts_starts_recomputed_steps_and_saves():
    assert share_on_steps(start=8, a_step=0.2, save=0.1, batch=32, interval=320) == pytest.approx((292 - 1) / 300 * 2 / 2.1)
    assert share_on_steps(start=8, a_step=0.2, save=0.1, batch=32, interval=64_000) == 0, "never a checkpoint in 300 s"
    best = best_interval(8, 0.2, 0.1, 32)
    shares = [share_on_steps(8, 0.2, 0.1, 32, images) for images in (best - 32, best, best + 32)]
    assert shares[1] == max(shares) and 32 * 10 < best < 32 * 100


def test_one_bit_is_a_difference():
    one = {"networks:a": torch.ones(3), "optimizers:b": torch.zeros(2)}
    bits = one["networks:a"].view(torch.int32).clone()
    bits[1] ^= 1
    assert differences(one, dict(one)) == []
    assert differences(one, one | {"networks:a": bits.view(torch.float32)}) == ["networks:a"]
    assert differences(one, {"networks:a": one["networks:a"]}) == ["optimizers:b"], "what is missing counts"
