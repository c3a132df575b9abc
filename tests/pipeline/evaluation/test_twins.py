"""The truth without a judge: what is drawn again scores 0, what is left alone 1, and what is only an average is found out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fader.method import Method
from pipeline import evaluation
from pipeline.config import RunConfig
from pipeline.data.datasets.faces import LOOKS, draw_face, face_labels, jpeg_bytes, read_faces
from pipeline.data.datasets.fruit import FRUIT, draw_one, fruit_label, read_fruit
from pipeline.data.datasets.twins import Twins, keep_twins
from pipeline.data.datasets.workers import silent
from pipeline.data.shards import ShardSet, prepare
from pipeline.evaluation import Report, Specification, markdown, promotion
from pipeline.evaluation.measure import OneProcess, Records, pillow_loader
from pipeline.images import Preprocessing, decode, preprocess, to_float
from pipeline.training.validation import BestSoFar, Measured
from tests.pipeline.evaluation.test_evaluation import Model, NoSettings

SIGHT = Preprocessing(64, "celeba")
SEED = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Drawn faces with the twins of 10 of them for testing."""
    folder = tmp_path_factory.mktemp("twins") / "set"
    faces = read_faces(folder / "source", count=100, seed=SEED, workers=1)
    keep_twins(folder / "source", faces, SEED, 1, silent)
    return prepare(faces, folder, workers=1)


class Editor(Method):
    """Knows a photo's record, and paints what a test says of its twins."""

    name, Settings = "editor", NoSettings

    def __init__(self, shards: ShardSet, paint) -> None:
        super().__init__(NoSettings(), shards.attributes, SIGHT.image_size)
        self.paint, self.twins, self.keys = paint, Twins(shards.path, "test"), {}
        photos = Records(16, OneProcess(), pillow_loader(Model(self, SIGHT), Specification()))
        split = shards.split("test")
        photos.read(split, len(split), lambda batch: self.keys.update({
            image.numpy().tobytes(): split.keys[int(row)] for image, row in zip(batch.images, batch.index)
        }))  # fmt: skip

    def optimizers(self):
        return {}

    def encode(self, images, labels):
        return images, labels

    def decode(self, latent, code):
        return torch.stack([self.decoded(*one) for one in zip(*latent, code)])

    def decoded(self, photo, labels, code):
        own = self.attributes.code(labels[None])[0]
        for attribute, columns in zip(self.attributes, self.attributes.code_slices()):
            if not torch.equal(own[columns], code[columns]):
                stored = self.twins.of(self.keys[photo.numpy().tobytes()], attribute.name, int(code[columns].argmax()))
                looks = np.stack([preprocess(decode(data), SIGHT) for data in stored])
                return self.paint(photo, to_float(torch.from_numpy(looks)))
        return photo


def truth(shards: ShardSet, paint) -> Report:
    model = Model(Editor(shards, paint), SIGHT)
    return evaluation.evaluate(model, [], shards, Specification(tables=("fidelity",), batch_size=4))


def test_a_twin_is_the_face_with_one_attribute_changed_in_each_look_that_the_photo_allows(shards):
    split, twins = shards.split("test"), Twins(shards.path, "test")
    assert len(split.keys) and not Twins(shards.path, "train")
    for key in split.keys:
        index = int(key) - 1
        for name, own in face_labels(SEED, index).items():
            assert twins.of(key, name, own) == []
            for value in {*range(3 if name == "Beard" else 2)} - {own}:
                many = name == "Blond_Hair" or (value and name in ("Wearing_Hat", "Eyeglasses"))
                stored = twins.of(key, name, value)
                assert len(stored) == (LOOKS if many else 1) and len(set(stored)) > len(stored) / 2, "two may look alike"
                if not many:
                    assert stored == [jpeg_bytes(draw_face(SEED, index, **{name: value}))]


@pytest.fixture(scope="module")
def oracle(shards) -> Report:
    return truth(shards, lambda photo, looks: looks[0])


@pytest.fixture(scope="module")
def identity(shards) -> Report:
    return truth(shards, lambda photo, looks: photo)


def test_the_twin_itself_scores_0_in_any_look_and_nothing_done_1(shards, oracle, identity):
    for report in (oracle, truth(shards, lambda photo, looks: looks[-1])):
        assert {t.attribute for t in report.truth} == {*shards.attributes.names}
        for t in (t for t in report.truth if t.records):
            assert t.inside.value < 1e-9 and t.outside.value < 1e-3 and t.reconstruction_outside.value == 0
    for t in (t for t in identity.truth if t.records):
        assert t.inside.value == pytest.approx(1) and t.outside.value == t.reconstruction_outside.value == 0
    assert sum(t.records for t in identity.truth) == 6 * len(shards.split("test")), "each swap of each record counts once"
    assert identity.metrics()["test/twin_inside.Wearing_Hat_0_to_1"] == pytest.approx(1)
    assert "The truth, without a judge" in markdown([identity])


def test_a_number_of_the_twins_bounds_a_promotion_and_may_choose_the_best(shards, oracle, identity):
    model = Model(Editor(shards, None), SIGHT)
    known = evaluation.quantities(model, [], shards, Specification(tables=("fidelity",)))
    bound = promotion.parse_bound("Wearing_Hat_0_to_1.twin_inside=0.6", "--max", known)
    assert promotion.reasons_against(oracle, None, [bound], bound.quantity) == []
    (reason,) = promotion.reasons_against(identity, None, [bound])
    assert reason == "twin_inside.Wearing_Hat_0_to_1 is 1; it must be at most 0.6"
    (reason,) = promotion.reasons_against(identity, oracle, [], bound.quantity)
    assert "is not better than" in reason and promotion.reasons_against(oracle, identity, [], bound.quantity) == []
    assert not [name for name in evaluation.quantities(model, [], shards, Specification(tables=("error",))) if "twin" in name]
    best = BestSoFar(RunConfig(best="twin_outside.Smiling_1_to_0", best_mse_factor=0.0), "mse", known)
    values = [{"twin_outside.Smiling_1_to_0": value} for value in (0.2, 0.3, 0.1)]
    assert [best.note(Measured(k, value)) for k, value in enumerate(values)] == [True, False, True]


def test_an_apple_is_held_against_the_orange_in_its_place(tmp_path):
    """Each picture lies in its kind's folder; the other kind in its place scores 0 in any look, and the picture itself 1."""
    fruit = read_fruit(tmp_path / "source", count=60, seed=SEED, workers=1)
    keep_twins(tmp_path / "source", fruit, SEED, 1, silent)
    shards = prepare(fruit, tmp_path, workers=1)
    assert shards.attributes.names == ("orange",) and {len(shards.split(name)) for name in ("valid", "test")} == {6}
    for key, location, label in zip(fruit.keys, fruit.locations, fruit.labels[:, 0]):
        assert fruit_label(SEED, int(key[-6:]) - 1) == label == FRUIT.index(location.split("/")[-2])
    oracle = truth(shards, lambda photo, looks: looks[-1])
    assert sum(t.records for t in oracle.truth) == 6 and max(t.inside.value for t in oracle.truth) < 1e-9
    assert all(t.inside.value == pytest.approx(1) for t in truth(shards, lambda photo, looks: photo).truth)
    own = [np.asarray(draw_one(SEED, 3, label), int) for label in (0, 1)]
    apart = np.abs(own[0] - own[1]).max(2) > 8
    assert 0.1 < apart.mean() < 0.5 and not apart[:20].any() and not apart[:, :20].any(), "only the fruit differs"


def test_a_grey_average_is_no_hat(shards):
    grey = truth(shards, lambda photo, looks: torch.zeros_like(photo))
    (hat,) = (t for t in grey.truth if (t.attribute, t.to) == ("Wearing_Hat", "1"))
    assert hat.records and hat.inside.value > 0.3, hat
