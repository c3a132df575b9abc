"""docs/writing-a-method.md: its method, taken from the page, is trained by the commands of the page, evaluated and moves sliders."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch

from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Batch, Clock
from pipeline import config
from pipeline.engine import Engine
from tests.commands import ROOT

PAGE = (ROOT / "docs/writing-a-method.md").read_text(encoding="utf-8")
ATTRIBUTES = Attributes([Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "short", "long"))])


def fenced(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return block


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """The page's method, known by its name while a test runs."""
    file = tmp_path / "mini.py"
    file.write_text(fenced("python"))
    spec = importlib.util.spec_from_file_location("mini_of_the_page", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield METHODS["mini"]
    del METHODS["mini"]


def batch(draw: int) -> Batch:
    """Brightness says whether somebody smiles."""
    labels = torch.stack([torch.arange(24) % 2, torch.arange(24) % 3], 1).float()
    images = 0.1 * torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch.alone((images + labels[:, :1, None, None] - 0.5).clamp(-1, 1), labels, draw=draw)


def test_it_is_a_hundred_lines():
    assert len(fenced("python").splitlines()) <= 110


def test_each_phase_moves_its_networks_it_learns_and_its_slider_moves(mini):
    torch.manual_seed(0)
    method = mini(mini.Settings(channels=8, fool_weight=1.0, ramp_images=0), ATTRIBUTES, 16)
    engine, (stage,) = Engine(method), method.stages()
    before = {name: [p.clone() for p in network.parameters()] for name, network in method.networks.items()}
    for phase in stage.phases:
        engine.update(phase, batch(0), Clock())
        after = {name: list(network.parameters()) for name, network in method.networks.items()}
        moved = {name for name in before if any(not torch.equal(a, b) for a, b in zip(before[name], after[name]))}
        assert moved == set(phase.trains)
        before = {name: [p.clone() for p in parameters] for name, parameters in after.items()}
    reports = [engine.update(phase, batch(draw), Clock()) for draw in range(60) for phase in stage.phases]
    errors = [float(report["autoencoder/mse"]) for report in reports if "autoencoder/mse" in report]
    assert errors[-1] < 0.6 * errors[0], errors[::10]
    with torch.no_grad():
        latent, labels = method.encode(batch(0).images, batch(0).attributes), batch(0).attributes
        shown = [method.decode(latent, ATTRIBUTES.code(ATTRIBUTES.swapped(labels, "Smiling", value))) for value in (0, 1)]
    assert (shown[1] - shown[0]).mean() > 0.1, "brightness does not follow the slider"


def test_its_experiment_trains_and_is_evaluated(mini, tmp_path, faces):
    from pipeline import models
    from pipeline.data.shards import ShardSet
    from pipeline.evaluation.evaluator import evaluate
    from pipeline.evaluation.specification import Specification
    from pipeline.training.run import train

    (tmp_path / "mini.yaml").write_text(fenced("yaml"))
    small = ("method.images=64", "data.image_size=16", "judge=null", "tracking.enabled=false")
    experiment = config.load(tmp_path / "mini.yaml", [*small, f"data.path={faces}"])
    run = train(experiment, tmp_path / "run")
    report = evaluate(models.load(str(run)), [], ShardSet.open(faces), Specification(tables=("fidelity",)))
    assert report.metrics()["test/mse"] < 1
