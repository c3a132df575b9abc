"""Champions: moved for one promotion at a time, rolled back to the version before, and by nobody else meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from pipeline.models import aliases
from tests.commands import environment
from tests.runs import make_store


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A store with the registered model `faces` of four versions."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_store(tmp_path))
    client = MlflowClient()
    client.create_registered_model("faces")
    for _ in range(4):
        client.create_model_version("faces", str(tmp_path))
    return client


def locks(client) -> list[str]:
    return [model.name for model in client.search_registered_models() if "promoting" in model.name]


def test_a_champion_is_moved_tagged_and_rolled_back_step_by_step(client):
    assert aliases.champion_of("faces") is None
    aliases.promote("faces", 1, None, {"promotion.swap_accuracy": "0.9"})
    aliases.promote("faces", 3, 1, {})
    assert aliases.champion_of("faces") == 3
    assert client.get_model_version("faces", "1").tags["promotion.swap_accuracy"] == "0.9"
    assert aliases.rollback("faces") == (3, 1)
    assert aliases.champion_of("faces") == 1 and aliases.ROLLED_BACK in client.get_model_version("faces", "3").tags
    with pytest.raises(ValueError, match="version 1 of faces replaced no other champion"):
        aliases.rollback("faces")
    assert aliases.champion_of("faces") == 1 and not locks(client)


def test_a_champion_that_moved_meanwhile_is_left_alone(client):
    aliases.promote("faces", 1, None, {})
    with pytest.raises(ValueError, match="was no version and is version 1 now: somebody else promoted"):
        aliases.promote("faces", 2, None, {"promotion.mse": "0.1"})
    assert aliases.champion_of("faces") == 1 and "promotion.mse" not in client.get_model_version("faces", "2").tags
    with pytest.raises(ValueError, match="no champion"):
        client.create_registered_model("empty")
        aliases.rollback("empty")


SCRIPT = """
import sys
from pipeline.models import aliases
try:
    aliases.promote("faces", int(sys.argv[1]), 1, {"promotion.by": sys.argv[1]})
    print("moved")
except ValueError as error:
    print(error)
"""


def test_of_promotions_at_once_one_wins_and_the_other_is_told(client):
    """Two real processes promote two versions over version 1."""
    aliases.promote("faces", 1, None, {})
    line, env = [sys.executable, "-c", SCRIPT], environment(MLFLOW_DISABLE_TELEMETRY="true")
    started = [subprocess.Popen([*line, str(v)], env=env, stdout=subprocess.PIPE, text=True) for v in (2, 3)]
    said = {version: process.communicate(timeout=300)[0] for version, process in zip((2, 3), started)}
    [winner] = [version for version, words in said.items() if words == "moved\n"]
    assert aliases.champion_of("faces") == winner
    [loser] = [version for version in said if version != winner]
    assert f"is version {winner} now" in said[loser], said
    assert "promotion.by" not in client.get_model_version("faces", str(loser)).tags
    assert not locks(client)


def test_a_lock_is_waited_for_and_one_that_a_killed_process_left_is_passed(client, monkeypatch, caplog):
    client.create_registered_model("faces.promoting-7")
    monkeypatch.setattr(aliases, "LEASE_SECONDS", 2.0)
    began = time.monotonic()
    with caplog.at_level("INFO", logger="pipeline.models.aliases"):
        aliases.promote("faces", 1, None, {})
    assert time.monotonic() - began > 2 and "holds faces.promoting-7; waiting" in caplog.text
    assert aliases.champion_of("faces") == 1 and not locks(client)


def test_a_lock_that_was_held_too_long_moves_nothing(client, monkeypatch):
    monkeypatch.setattr(aliases, "_MOVE_SECONDS", -1.0)
    with pytest.raises(ValueError, match="took too long"):
        aliases.promote("faces", 1, None, {})
    assert aliases.champion_of("faces") is None and not locks(client)
