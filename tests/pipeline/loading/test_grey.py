"""`data.channels: 1`: from the config through every loader, a step of training and an export, pictures are grey."""

from __future__ import annotations

import pytest
import torch

from fader.method import Clock
from pipeline import config
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import prepare
from pipeline.engine import Engine
from pipeline.images import grid
from pipeline.loading.dali import open_loader
from pipeline.loading.plan import Plan, Request
from tests.pipeline.planted import write_celeba
from tests.runs import FADER, JUDGE


def experiment(method: dict, **data) -> config.Experiment:
    tree = {"path": "nowhere", "attributes": ["*"], "image_size": 32, "channels": 1} | data
    return config.build({"name": "grey", "method": method, "data": tree}, "test")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey")
    return prepare(read_celeba(write_celeba(folder / "source", 40)), folder / "set", workers=1)


@pytest.mark.parametrize("settings", [FADER, JUDGE], ids=["fader", "judge"])
def test_a_grey_experiment_trains_on_one_channel(shards, settings):
    grey = experiment(settings)
    method, split = config.build_method(grey, shards.attributes), shards.split("train")
    rows = Plan(len(split), 0).rows("a", 0, 8)
    engine, batches = Engine(method), {}
    for kind, cache in (("dali", "none"), ("dali", "device"), ("pillow", "none")):
        loader = open_loader(kind, cache, split, shards.attributes, grey.data.preprocessing(), seed=0)
        batches[kind, cache] = next(loader.batches([Request("a", 0, rows, flip=True)]))
    batch = batches["dali", "none"]
    assert batch.images.shape == (8, 1, 32, 32)
    assert torch.equal(batch.images, batches["dali", "device"].images)
    assert (batch.images - batches["pillow", "none"].images).abs().mean() < 0.01
    for phase in method.stages()[0].phases:
        report = engine.update(phase, batch, Clock())
        assert all(torch.isfinite(value) for value in report.values())
    if settings is FADER:
        decoded = method.decode(method.encode(batch.images, batch.attributes), method.attributes.code(batch.attributes))
        assert decoded.shape == batch.images.shape
        sheet = grid(torch.stack([batch.images, decoded], 1).detach())
        assert sheet.shape[2] == 3 and (sheet[..., 0] == sheet[..., 1]).all(), "a sheet of grey pictures is grey"


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="data.channels"):
        experiment(FADER, channels=2)
