"""`fader promote`: the champion moves when the bounds hold and it is beaten in the same evaluation, and not otherwise."""

from __future__ import annotations

import pytest

from launch.promote import promote
from pipeline import models
from pipeline.data.shards import ShardSet
from pipeline.evaluation import promotion
from pipeline.images import Preprocessing
from pipeline.models import aliases
from tests.launch.test_evaluate import shards  # noqa: F401
from tests.pipeline.evaluation.test_evaluation import SIZE, Identity, OneWay, Oracle, OtherSeer, Seer, Winked, Winker
from tests.runs import ATTRIBUTES, make_store


@pytest.fixture
def client(shards, tmp_path, monkeypatch):  # noqa: F811
    """Four versions of `faces`: one that changes nothing, the challenger that obeys, one that only ever adds a smile,
    and one that winks at a judge."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_store(tmp_path))
    client = MlflowClient()
    client.create_registered_model("faces")
    data = {"config": {"data": {"path": str(shards)}}, "data_digest": ShardSet.open(shards).digest, "images_seen": 1}
    sight = Preprocessing(SIZE, "center")
    seers = [models.Model(seer(ATTRIBUTES), data, ATTRIBUTES, sight, (), seer.__name__) for seer in (Seer, OtherSeer, Winked)]
    table = {seer.source: seer for seer in seers}
    for number, method in enumerate((Identity, Oracle, OneWay, Winker), 1):
        client.create_model_version("faces", str(tmp_path))
        card = data | {"registered": {"name": "faces", "version": number}}
        address = f"models:/faces/{number}"
        table[address] = models.Model(method(ATTRIBUTES), card, ATTRIBUTES, sight, tuple(seers[:2]), address)
    client.set_registered_model_alias("faces", "challenger", "2")

    def load(source, **_):
        name, at, alias = str(source).partition("@")
        return table[f"{name}/{client.get_registered_model('faces').aliases[alias]}" if at else name]

    monkeypatch.setattr(models, "load", load)
    return client


def test_a_challenger_that_holds_becomes_the_champion_with_its_figures(client, call):
    code, said, _ = call(promote, "faces", "--min", "smiling.swap=0.9", "--max", "mse=0.01", "--better-than", "champion")
    assert code == 0 and "faces has no champion yet" in said and "faces@champion is version 2 now" in said
    tags = client.get_model_version("faces", "2").tags
    assert tags["promotion.swap_accuracy.Smiling"] == "1 (1 to 1)" and tags["promotion.judge"] == "Seer, OtherSeer"
    assert tags["promotion.records"] == "40 of test" and float(tags["promotion.mse"].split()[0]) < 0.01
    code, _, wrong = call(promote, "faces")
    assert code == 2 and "version 2, which is the champion already" in wrong


def test_one_that_does_not_hold_or_is_not_better_leaves_the_champion_alone(client, call):
    aliases.promote("faces", 2, None, {})
    code, said, wrong = call(promote, "faces", "--version", "3", "--min", "smiling.swap=0.9", "--better-than", "champion")
    assert code == 1 and "1. Does it slide?" in said
    assert "not promoted: swap_accuracy.Smiling is 0.5; it must be at least 0.9" in wrong
    assert "which is not better than 1 of models:/faces/2" in wrong
    assert aliases.champion_of("faces") == 2 and not client.get_model_version("faces", "3").tags
    code, said, _ = call(promote, "faces", "--version", "1", "--better-than", "champion", "--by", "mse")
    assert code == 0 and "version 1 now, which replaces version 2" in said, "a picture left alone has the lower error"


@pytest.mark.parametrize(
    ("judges", "says"),
    [
        ("Seer", "not promoted: whether its swaps are flattered is not known, because only judges of one build read them"),
        ("Seer,Winked", "not promoted: Smiling is flattered: Winked reads swaps that Seer does not"),
    ],
)
def test_what_may_please_one_judge_alone_becomes_no_champion(client, call, judges, says):
    code, said, wrong = call(promote, "faces", "--version", "4", "--judge", judges)
    assert code == 1 and says in wrong and "1. Does it slide?" in said
    assert ("Smiling is FLATTERED" in said) == ("Winked" in judges) and aliases.champion_of("faces") is None


def test_the_champion_is_rolled_back(client, call):
    aliases.promote("faces", 1, None, {})
    assert call(promote, "faces", "--better-than", "champion")[0] == 0
    code, said, _ = call(promote, "faces", "--rollback")
    assert code == 0 and "faces@champion is version 1 again, no longer version 2" in said
    assert aliases.champion_of("faces") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--min", "smilling.swap=0.9"], "has no number 'smilling.swap'; did you mean swap_accuracy.Smiling?"),
        (["--min", "smiling.swap"], "--min smiling.swap: write NAME=VALUE"),
        (["--max", "mse=low"], "--max mse=low: write NAME=VALUE"),
        (["--by", "beauty"], "has no number 'beauty'"),
        (["--rollback"], "faces has no champion to roll back"),
    ],
)
def test_a_mistake_gets_one_line_and_moves_nothing(client, call, words, says):
    code, _, wrong = call(promote, "faces", *words)
    assert code == 2 and says in wrong.splitlines()[-1]
    assert aliases.champion_of("faces") is None


def test_numbers_are_named_in_full_or_in_short():
    known = ["swap_accuracy", "swap_accuracy.Smiling", "swap_accuracy.Smiling_to_1", "mse", "leak.Smiling", "kept.Beard"]
    for name, want in {
        "swap": "swap_accuracy",
        "Smiling.swap": "swap_accuracy.Smiling",
        "swap_accuracy.smiling_to_1": "swap_accuracy.Smiling_to_1",
        "mse": "mse",
        "smiling.leak": "leak.Smiling",
        "beard.kept": "kept.Beard",
    }.items():
        assert promotion.quantity(name, known) == want
