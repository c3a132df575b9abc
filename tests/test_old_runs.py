"""A run and an export by the code of commit a1fb627, whose settings were flat: they load, evaluate, edit, register and resume.

tests/old_runs holds a shard set of 12 records, a run of 64 images that stopped after 32, with every adversary that there was,
and the export of a run as published.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fader.losses.adversarial import patch_losses, patch_probabilities
from launch import command, evaluate, train
from pipeline import config, models
from pipeline.models import checkpoint
from tests.runs import JUDGE, make_run, make_store

OLD = Path(__file__).with_name("old_runs")
EDITED = {  # means and mean squares of a reconstruction and of its smile taken away, by the old code
    "full": ([-0.010596936423240777, -0.015247492957257691], [0.042903282744588656, 0.031490641832882284]),
    "export": ([-0.011853060371095125, -0.018935624845767052], [0.04209153801834307, 0.03130457306722743]),
}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def call(what, *words) -> int:
    """A command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["fader", *map(str, words)])
        command.main(what)
    return ended.value.code


@pytest.mark.parametrize("name", EDITED)
def test_they_edit_as_they_did(old, name):
    editing = models.load(name).editing
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    edited = editing.edit(images, torch.tensor([[1.0, 0.0]]), [[], [editing.slider("Smiling", -1)]])[0].double()
    for found, wanted in zip((edited.mean((1, 2, 3)), edited.square().mean((1, 2, 3))), EDITED[name]):
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_the_patch_discriminators_map_has_the_published_loss(old):
    """The loss is that of the mean of the map's sigmoids; the old network gave that mean itself. Numbers of the old code."""
    method = config.build_method(config.load_run("full"), models.load("full").attributes)
    network = method.networks["patch_discriminator"].eval()
    stored = checkpoint.read_networks(old / "full/checkpoints/images-000000000032")
    network.load_state_dict(stored["patch_discriminator"])
    logits = network(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
    assert logits.shape == (2, 1, 2, 2)
    probabilities = patch_probabilities(logits)
    torch.testing.assert_close(probabilities, torch.tensor([0.4969242215156555, 0.4975641965866089]))
    torch.testing.assert_close(patch_losses(probabilities, 0.8), torch.tensor([0.6968570947647095, 0.6960820555686951]))
    torch.testing.assert_close(patch_losses(probabilities, 0.2), torch.tensor([0.6894751191139221, 0.6902360916137695]))


def test_flat_settings_are_translated_and_say_the_same(old):
    full, plain = config.load_run("full").method, models.load("export").method.settings
    assert (full.latent.weight, full.latent.rise, full.latent.ramp_images, full.latent.warmup_images) == (0.01, "cosine", 48, 8)
    assert (full.latent.steps, full.latent.learning_rate, full.latent.hidden_channels, full.latent.dropout) == (2, 1e-3, 4, 0.3)
    assert (full.patch.weight, full.patch.smooth_label, full.patch.learning_rate) == (0.1, 0.2, None)
    assert (full.classifier.weight, full.classifier.hidden_channels, full.classifier.learning_rate) == (0.2, 4, 3e-3)
    assert (full.solved.weight, full.solved.steps, full.solved.num_hidden, full.solved.half_life) == (0.3, 1, 4, 2000)
    assert (full.reconstruction.weight, full.shared_batch, full.ema_half_life) == (1.0, True, 20)
    assert plain.latent == full.latent and plain.patch.weight == plain.classifier.weight == plain.solved.weight == 0
    method = config.build_method(config.load_run("full"), models.load("full").attributes)
    assert method.weights(32) == {name: pytest.approx(weight / 2) for name, weight in
                                  (("latent", 0.01), ("patch", 0.1), ("classifier", 0.2), ("solved", 0.3))}  # fmt: skip


def test_it_is_evaluated_exported_and_registered(old, monkeypatch):
    data = {"attributes": ["Smiling", "Wearing_Hat"], "image_size": 32, "crop": "center", "path": "data"}
    attributes = models.load("full").attributes
    judge = make_run(old / "judge", JUDGE, data=data, attributes=attributes)
    assert call(evaluate.evaluate, "full", "--judge", judge, "--tables", "swap,fidelity", "--device", "cpu") == 0
    assert json.loads((old / "full/report/evaluation-test-fidelity-swap.json").read_text())["metrics"]["test/mse"] > 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_store(old))
    version = models.register("full", "old", out=old / "out")
    card = json.loads((version.export / "card.json").read_text())
    assert card["settings"]["latent"]["weight"] == 0.01, "what is written anew has nested settings"
    assert models.load(version.address).method.settings == config.load_run("full").method


def test_it_is_resumed_and_says_that_draws_differ_from_there_on(old, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        assert call(train.train, "--resume", "full") == 0
    said = [record.message for record in caplog.records if "earlier version" in record.message]
    assert len(said) == 1 and "drawn anew from here on" in said[0]
    state, about = checkpoint.read(checkpoint.latest(old / "full"))
    before, _ = checkpoint.read(OLD / "full/checkpoints/images-000000000032")
    assert about["position"]["clock"]["images"] == 64 and state.networks.keys() == before.networks.keys()
    assert state.networks["critic/count"] > before.networks["critic/count"], "the critic goes on from its sums"
    assert all(value.isfinite().all() for value in state.networks.values())
    tree = yaml.safe_load((old / "full/config.yaml").read_text())["method"]
    assert tree["latent"]["weight"] == 0.01 and "lambda_max" not in tree
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert call(train.train, "--resume", "full", "method.images=80") == 0
    assert not [record for record in caplog.records if "earlier version" in record.message], "its checkpoint is a new one"


@pytest.mark.parametrize("key, value", [("lambda_shape", "feedback"), ("fool", "marginal"), ("critic", "kernel")])
def test_what_was_taken_back_is_refused_by_name(old, key, value):
    for path in (old / "full/config.yaml", old / "export/card.json"):
        tree = yaml.safe_load(path.read_text())
        tree["settings" if path.suffix == ".json" else "method"][key] = value
        path.write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree))
        with pytest.raises(ValueError, match=f"was made with method.{key}: {value}; this was taken back, see docs/log.md"):
            models.load(path.parent)


def test_an_override_by_an_old_key_is_refused_with_its_new_name(old):
    with pytest.raises(ValueError, match="method.lambda_max is now method.latent.weight"):
        config.load_run("full", ["method.lambda_max=1"])
    assert config.load_run("full", ["method.latent.weight=1"]).method.latent.weight == 1
