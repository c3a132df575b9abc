"""Every method that edits or samples is exported with what use needs, loads again, and a service answers as the run does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fader.method import METHODS
from pipeline import models
from pipeline.models.serving import answer
from tests.runs import make_run

SIZES = {"init_channels": 4, "max_channels": 8, "hidden_channels": 8}
KEPT = {
    "cgan": {"generator"},
    "cvae": {"encoder", "decoder"},
    "icgan": {"generator", "encoder_z"},
    "vacgan": {"generator"},
    "vaegan": {"encoder", "decoder"},
}
SLIDERS = {"sliders": '{"Smiling": 1, "Beard": "full"}'}


@pytest.fixture(scope="module", params=sorted(KEPT))
def exported(request, tmp_path_factory) -> tuple[str, models.Model, Path]:
    """A method's name, its run as loaded, and the folder of its export."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    sizes = {key: size for key, size in SIZES.items() if key in METHODS[name].Settings.__dataclass_fields__}
    run = make_run(folder / "run", {"name": name, **sizes})
    return name, models.load(run), models.export(run, folder / "export")


def test_every_method_that_makes_pictures_is_here():
    others = {"aligner", "fader", "judge"}  # tried elsewhere
    assert {name for name, kind in METHODS.items() if kind.__module__.startswith("fader.")} == {*KEPT, *others}


def test_an_export_holds_the_networks_that_use_needs_and_makes_the_runs_pictures(exported):
    name, run, folder = exported
    loaded = models.load(folder)
    assert set(loaded.method.networks) == KEPT[name]
    for model in (run, loaded):
        assert not any(network.training for network in model.method.networks.values())
    seeds = torch.tensor([3, 5])
    assert torch.equal(loaded.sampling.sample(seeds), run.sampling.sample(seeds))
    assert loaded.sampling.sample(seeds).shape == (2, 3, 32, 32)


def test_a_service_answers_as_the_run_does_and_attributes_change_the_answer(exported):
    name, run, folder = exported
    loaded = models.load(folder)
    edits = models.editor(loaded.method) is not None
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    given = pictures if edits else np.array([4, 9])
    got, plain = answer(loaded, given, SLIDERS), answer(loaded, given, {})
    assert got.shape == (2, 3, 32, 32) and np.abs(got).max() <= 1 and not np.array_equal(got, plain)
    can = run.editing if edits else run.sampling
    moves = [can.slider("Smiling", 1), can.slider("Beard", "full")]
    if edits:
        images = torch.from_numpy(pictures)
        want = can.edit(images, can.labels(images)[0], [moves])[:, 0]
    else:
        want = can.sample(torch.tensor([4, 9]), sliders=moves)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-7)
