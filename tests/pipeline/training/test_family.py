"""Methods of several stages and networks, trained: IcGAN resumes anywhere, and a run of a sampler keeps labels that occur."""

from __future__ import annotations

import dataclasses
import json

import torch

from fader.methods import IcGan, IcGanSettings
from pipeline import models
from pipeline.data.shards import ShardSet
from pipeline.engine import Engine
from pipeline.training.steps import Position, steps
from tests import golden
from tests.test_configs import AVAILABLE, CELEBA
from tests.warm import forked

CONFIG = """
name: tiny
method: {name: vacgan, init_channels: 4, max_channels: 8, hidden_channels: 8, images: 16}
data: {path: FACES, attributes: [Wearing_Hat, Smiling], image_size: 32, threads: 1}
batch_size: 8
run: {picture_images: 0}
tracking: {enabled: false}
"""


def engine() -> Engine:
    torch.manual_seed(11)
    settings = IcGanSettings(images=24, init_channels=4, max_channels=8, hidden_channels=8, noise_width=4)
    method = IcGan(settings, AVAILABLE.select(CELEBA[:2]), golden.IMAGE_SIZE)
    for network in method.networks.values():
        network.double()
    return Engine(method)


def go_on(trained: Engine, position: Position):
    """Make every step that is left; after each, give where it stands and the state."""
    for step in steps(trained.method.stages(), golden.BATCH, position):
        for turn in step.turns:
            batch = golden.batch(trained.method.attributes, turn.stream, turn.draw)
            images = batch.images if turn.phase.source == "images" else None
            trained.update(turn.phase, dataclasses.replace(batch, images=images), step.clock)
        yield step.after, trained.state()


def test_an_icgan_resumes_to_the_last_bit_at_any_point_of_its_stages():
    unbroken = list(go_on(engine(), Position()))
    assert [position.clock.stage for position, _ in unbroken] == [0, 0, 0, 1, 2, 2, 3, 3]
    end = unbroken[-1][1]
    for position, state in unbroken[1:-1:2]:  # within the GAN, before the encoders, within one, between them
        resumed = engine()
        resumed.load(state)
        *_, (_, found) = go_on(resumed, position)
        for part in ("networks", "optimizers"):
            wanted = getattr(end, part)
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in getattr(found, part).items()), position


def test_a_run_of_a_sampler_keeps_labels_of_its_training_records(tmp_path, faces):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("FACES", str(faces)))
    forked("launch.train", path, f"run.folder={tmp_path / 'run'}")
    split = ShardSet.open(faces).split("train")
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["labels"]
    assert len(rows) == len(split)
    columns = [split.attributes.index(name) for name in ("Wearing_Hat", "Smiling")]
    assert [list(map(float, row.split())) for row in rows] == split.labels[:, columns].tolist()
    loaded = models.load(tmp_path / "run")
    assert loaded.sampling.occurring.shape == (len(rows), 2)
