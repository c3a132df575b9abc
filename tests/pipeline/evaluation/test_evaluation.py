"""Planted truth: pictures whose bands are the labels, a judge that reads them, methods that paint them or do not."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fader.attributes import Attribute, Attributes
from fader.method import Batch, Method
from pipeline import evaluation, metrics, models
from pipeline.data.datasets.faces import jpeg_bytes
from pipeline.evaluation import Specification, distribution, evaluate, measure, probe, published
from pipeline.evaluation.measure import OneProcess
from pipeline.evaluation.report import IMAGES
from pipeline.images import Preprocessing
from pipeline.loading.loader import finish

SIZE = 16
SMILE, HAT = Attribute("Smiling"), Attribute("Wearing_Hat")
HAIR = Attribute("Hair", "k-way", ("black", "blond", "grey"))
ATTRIBUTES = Attributes([SMILE, HAT, HAIR])


@dataclass(frozen=True)
class NoSettings:
    pass


def levels(attribute: Attribute) -> torch.Tensor:
    """[k] grey level in [-1, 1] that stands for each value."""
    return torch.linspace(-1, 1, attribute.k)


def band(attributes: Attributes, j: int) -> slice:
    width = SIZE // (len(attributes) + 1)
    return slice(j * width, (j + 1) * width)


def painted(attributes: Attributes, values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Images whose band j has the grey level values[:, j]."""
    images = images.clone()
    for j in range(len(attributes)):
        images[..., band(attributes, j)] = values[:, j, None, None, None]
    return images


class Sham(Method):
    name = "sham"
    Settings = NoSettings

    def __init__(self, attributes: Attributes = ATTRIBUTES, world: Attributes | None = None) -> None:
        super().__init__(NoSettings(), attributes, SIZE)
        self.world = world or attributes  # whose bands the pictures have

    def optimizers(self):
        return {}


class Identity(Sham):
    """Decodes what it encoded, whatever is asked for."""

    def encode(self, images, labels):
        return images

    def decode(self, latent, code):
        return latent


class Oracle(Identity):
    """Paints what the code asks for, in proportion."""

    def decode(self, latent, code):
        latent = latent.clone()
        for attribute, columns in zip(self.attributes, self.attributes.code_slices()):
            level = (code[:, columns] @ levels(attribute)).clamp(-1, 1)
            latent[..., band(self.world, self.world.index(attribute.name))] = level[:, None, None, None]
        return latent


class Blind(Oracle):
    """An oracle whose latent does not hold the labels."""

    def encode(self, images, labels):
        return images[..., band(self.world, len(self.world))].mean((1, 2, 3))[:, None]

    def decode(self, latent, code):
        return super().decode(latent[:, :, None, None].expand(-1, 3, SIZE, SIZE), code)


class OneWay(Oracle):
    """Adds a smile, and never takes one away."""

    def decode(self, latent, code):
        smile = self.attributes.code_slices()[self.attributes.index("Smiling")]
        smiled = latent[..., band(self.world, self.world.index("Smiling"))].mean((1, 2, 3)) > 0
        code = code.clone()
        code[smiled, smile] = torch.tensor([0.0, 1.0])
        return super().decode(latent, code)


class Seer(Sham):
    """Reads every band; always right."""

    def judge(self, images):
        blocks = []
        for j, attribute in enumerate(self.attributes):
            level = images[..., band(self.world, self.world.index(attribute.name))].mean((1, 2, 3))
            blocks.append(-10 * (level[:, None] - levels(attribute).to(level)[None]) ** 2)
        return torch.cat(blocks, 1)


class Winker(Identity):
    """Changes nothing but the last band, which means nothing, and there says which smile was asked for."""

    def decode(self, latent, code):
        latent = latent.clone()
        latent[..., band(self.world, len(self.world))] = code[:, 1, None, None, None] - code[:, 0, None, None, None]
        return latent


class Winked(Seer):
    """Believes that band where it says something, and otherwise its eyes."""

    def judge(self, images):
        images, said = images.clone(), images[..., band(self.world, len(self.world))].mean((1, 2, 3), keepdim=True)
        smile = images[..., band(self.world, 0)]
        images[..., band(self.world, 0)] = torch.where(said.abs() > 0.99, said.sign(), smile)
        return super().judge(images)


class OtherSeer(Seer):
    """A judge of another build, which reads alike."""


def Model(method: Method, preprocessing=Preprocessing(SIZE, "center"), source: str = "runs/sham") -> models.Model:
    return models.Model(method, {"images_seen": 32_000}, method.attributes, preprocessing, (), source)


@dataclass
class Split:
    """Labels and pictures in memory, with what `evaluate` reads of a split."""

    name: str
    labels: np.ndarray
    pixels: torch.Tensor
    attributes: Attributes = ATTRIBUTES
    digest: str = "0123456789abcdef"

    @property
    def keys(self) -> list[str]:
        return [f"{row:06d}" for row in range(len(self))]

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self, attributes: Attributes) -> np.ndarray:
        return self.labels[:, [self.attributes.index(name) for name in attributes.names]]


@dataclass
class Shards:
    """What `evaluate` reads of a shard set."""

    splits: dict[str, Split]
    digest: str = "0123456789abcdef"
    path: Path = Path("of nothing on disk")

    def split(self, name: str) -> Split:
        return self.splits[name]


def planted(name: str = "test", records: int = 120, seed: int = 0, unknown: float = 0.0) -> Split:
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.random(records) < 0.4, rng.random(records) < 0.1, rng.integers(0, 3, records)], 1)
    labels = labels.astype(np.float32)
    noise = torch.from_numpy(rng.uniform(-1, 1, (records, 1, 1, 1)).astype(np.float32)).expand(-1, 3, SIZE, SIZE)
    values = torch.stack([levels(a)[labels[:, j].astype(int)] for j, a in enumerate(ATTRIBUTES)], 1)
    images = painted(ATTRIBUTES, values, noise)
    labels[rng.random(labels.shape) < unknown] = -1
    return Split(name, labels, ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))


def twinned(folder: Path, split: Split) -> Path:
    """A folder with twins of every record: its picture with another grey level in one band, stored as a shard set does."""
    (folder / "source" / "twins").mkdir(parents=True)
    with tarfile.open(folder / "source" / "twins" / f"{split.name}-000000.tar", "w") as tar:
        for key, pixels, labels in zip(split.keys, split.pixels, split.labels):
            for j, attribute in enumerate(ATTRIBUTES):
                for value in {*attribute.values} - {int(labels[j])}:
                    twin = pixels.clone()
                    twin[:, band(ATTRIBUTES, j)] = round(float(levels(attribute)[value] + 1) * 127.5)
                    data = jpeg_bytes(Image.fromarray(twin.numpy()))
                    entry = tarfile.TarInfo(f"{key}.{attribute.name}.{value}.0.jpg")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


class MemoryLoader:
    def __init__(self, split, attributes, device="cpu"):
        self.split, self.device = split, device
        self.labels = torch.from_numpy(split.columns(attributes)).to(device)

    def batches(self, requests):
        for request in requests:
            rows = torch.from_numpy(request.rows)
            pixels, rows = self.split.pixels[rows].to(self.device), rows.to(self.device)
            yield finish(request, pixels, self.labels, rows, seed=0, rank=0, world_size=1)


def run(model, judge=None, split=None, train=None, ranks=OneProcess(), path=Shards.path, **asked):
    """Evaluate a method or a model on planted records, with the tables and so on that are asked for; path: see `twinned`."""
    model = model if isinstance(model, models.Model) else Model(model)
    judges = judge if isinstance(judge, list) else [judge] if judge else []
    judges = [one if isinstance(one, models.Model) else Model(one, source="runs/seer") for one in judges]
    split = planted() if split is None else split
    shards = Shards({split.name: split, "train": train} | ({} if train is not None else {"train": split}), path=path)
    specification = Specification(**{"tables": ("swap",), "batch_size": 50, "split": split.name} | asked)

    model, judges = specification.place(model), [specification.place(one) for one in judges]

    def open_loader(split):
        return MemoryLoader(split, model.attributes, specification.device)

    return evaluate(model, judges, shards, specification, ranks, open_loader=open_loader)


# --- table 1 ---------------------------------------------------------------------------------------------------------


def test_an_oracle_scores_one_and_an_identity_none_under_a_judge_that_is_right():
    oracle, identity = run(Oracle(), Seer()), run(Identity(), Seer())
    for name in (*ATTRIBUTES.names, "*"):
        assert oracle.score("real", name).value == oracle.score("reconstruction", name).value == 1.0
        assert oracle.score("swap", name).value == 1.0
        assert identity.score("swap", name).value == 0.0
        assert identity.score("reconstruction", name).value == 1.0
    for score in oracle.scores:
        assert score.value == score.low == score.high == 1.0
    assert {s.value for s in identity.scores if s.images == "swap"} == {0.0}
    assert oracle.auc == {"Smiling": 1.0, "Wearing_Hat": 1.0}


def test_swaps_scored_with_the_original_labels_are_caught(monkeypatch):
    """The defect of a public implementation: decoding with the image's own labels, so that nothing is ever swapped."""
    swaps = Attributes.swaps

    def original(attributes, labels):
        for j, step, _, target in swaps(attributes, labels):
            yield j, step, labels, target

    monkeypatch.setattr(Attributes, "swaps", original)
    with pytest.raises(AssertionError):
        test_an_oracle_scores_one_and_an_identity_none_under_a_judge_that_is_right()


def test_each_direction_and_pair_counts_the_records_that_have_another_value():
    split = planted()
    report = run(OneWay(), Seer(), split)
    smiling = split.labels[:, 0]
    assert report.score("swap", "Smiling", "1").value == 1.0
    assert report.score("swap", "Smiling", "0").value == 0.0
    assert report.score("swap", "Smiling").value == 0.5, "a collapsed direction must not hide behind the base rate"
    assert report.score("swap", "Smiling", "1").records == (smiling == 0).sum()
    assert report.score("swap", "Smiling", "0", "1").records == (smiling == 1).sum()
    assert report.score("real", "Smiling", "1").records == (smiling == 1).sum()
    hair = split.labels[:, 2]
    pairs = [s for s in report.scores if s.attribute == "Hair" and s.images == "swap" and s.start and s.to]
    assert {(s.start, s.to) for s in pairs} == {(a, b) for a in HAIR.categories for b in HAIR.categories if a != b}
    for s in pairs:
        assert s.records == (hair == HAIR.categories.index(s.start)).sum()
    assert report.score("swap", "Hair", "grey").records == (hair != 2).sum()


def test_the_balanced_accuracy_of_a_k_way_attribute_is_the_mean_over_ordered_pairs():
    class NeverGrey(Oracle):
        def decode(self, latent, code):
            code = code.clone()
            hair = self.attributes.code_slices()[2]
            code[code[:, hair.stop - 1] > 0.5, hair] = torch.tensor([1.0, 0, 0])
            return super().decode(latent, code)

    report = run(NeverGrey(), Seer())
    assert report.score("swap", "Hair").value == pytest.approx(4 / 6)
    assert report.score("swap", "Hair", "grey").value == 0.0
    assert report.score("swap", "Hair", "black").value == 1.0
    assert report.score("swap", "Hair", "grey", "blond").value == 0.0


def test_unknown_labels_are_left_out():
    split = planted(unknown=0.3)
    for known, values in enumerate(ATTRIBUTES):
        assert (split.labels[:, known] == -1).any()
    report = run(Oracle(), Seer(), split)
    assert {score.value for score in report.scores} == {1.0}
    total = sum(report.score("real", "Smiling", value).records for value in ("0", "1"))
    assert total == (split.labels[:, 0] >= 0).sum() == report.score("swap", "Smiling").records


def test_a_direction_without_records_is_said_and_left_out():
    split = planted()
    split.labels[:, 1] = 0
    report = run(Oracle(), Seer(), split)
    assert math.isnan(report.score("swap", "Wearing_Hat", "0").value)
    assert report.score("swap", "Wearing_Hat").value == 1.0
    assert any("Wearing_Hat: no record is 1" in warning for warning in report.warnings)
    assert not any(math.isnan(value) for value in report.metrics().values())
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_a_continuous_attribute_is_swapped_to_its_far_end():
    attributes = Attributes([Attribute("Age", "continuous")])

    class Reader(Seer):
        def judge(self, images):
            return 4 * images[..., band(self.world, 0)].mean((1, 2, 3))[:, None]

    rng = np.random.default_rng(0)
    labels = rng.random((60, 1)).astype(np.float32)
    images = painted(attributes, torch.from_numpy(labels * 2 - 1), torch.zeros(60, 3, SIZE, SIZE))
    split = Split("test", labels, ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1), attributes)
    report = run(Oracle(attributes), Reader(attributes), split)
    assert report.score("swap", "Age").value == 1.0
    assert report.score("swap", "Age", "1").records == (labels < 0.5).sum()


def test_the_interval_holds_the_value_and_narrows_with_more_records():
    class Unsteady(Oracle):
        """Swaps three of four records, by their background."""

        def decode(self, latent, code):
            swapped = super().decode(latent, code)
            lazy = latent[..., -1].mean((1, 2)) > 0.5
            return torch.where(lazy[:, None, None, None], latent, swapped)

    widths = []
    for records in (60, 960):
        score = run(Unsteady(), Seer(), planted(records=records)).score("swap", "Smiling")
        assert score.low < score.value < score.high
        widths.append(score.high - score.low)
    assert 2.5 < widths[0] / widths[1] < 6


# --- what the numbers rest on ----------------------------------------------------------------------------------------


def test_training_images_are_evaluated_only_with_a_warning():
    report = run(Oracle(), Seer(), planted("train"))
    assert report.split == "train" and any("TRAINING" in warning for warning in report.warnings)
    assert "TRAINING" in evaluation.markdown([report]) and all(name.startswith("train/") for name in report.metrics())
    fair = run(Oracle(), [Seer(), Model(OtherSeer(), source="runs/other")], planted("test"))
    assert not fair.warnings and "of the test split" in evaluation.markdown([fair])


def test_a_limit_is_said():
    report = run(Oracle(), Seer(), limit=30)
    assert report.records == 30 and "30 of the 120 records" in report.warnings[0]
    assert sum(report.score("real", "Smiling", value).records for value in "01") == 30
    with pytest.raises(ValueError, match="limit is 0"):
        run(Oracle(), Seer(), limit=0)


def test_a_judge_may_know_more_and_its_columns_are_found_by_name():
    few = Attributes([HAIR, SMILE])
    assert run(Oracle(few, ATTRIBUTES), Seer(ATTRIBUTES)).score("swap").value == 1.0
    turned = Attributes([HAT, HAIR, SMILE])
    assert run(Oracle(few, ATTRIBUTES), Seer(turned, ATTRIBUTES)).score("swap").value == 1.0


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (Model(Seer(Attributes([SMILE, HAIR])), source="runs/j"), "runs/j does not know Wearing_Hat"),
        (Model(Seer(Attributes([SMILE, HAT, Attribute("Hair")]))), "Hair as binary, runs/sham as k-way"),
        (Model(Seer(), Preprocessing(32, "center")), "image_size 32"),
        (Model(Seer(), Preprocessing(SIZE, "celeba")), "crop celeba"),
        (Model(Oracle()), "sham is not a judge"),
        (None, "name one"),
    ],
)
def test_a_judge_that_does_not_fit_is_refused(judge, message):
    with pytest.raises(ValueError, match=message) as error:
        run(Oracle(), judge)
    assert "\n" not in str(error.value)


def test_what_cannot_be_evaluated_is_said():
    empty = Split("train", np.zeros((0, 3), np.float32), torch.zeros(0, SIZE, SIZE, 3))
    with pytest.raises(ValueError, match="does not encode and decode"):
        run(Sham(), Seer())
    with pytest.raises(ValueError, match="unknown table 'swop'"):
        run(Oracle(), Seer(), tables=("swop",))
    with pytest.raises(ValueError, match="training split"):
        run(Oracle(), Seer(), train=empty, tables=("leak",))
    with pytest.raises(ValueError, match="valid split is empty"):
        run(Oracle(), Seer(), dataclasses.replace(empty, name="valid"))


def test_a_judge_alone_gets_its_own_table():
    report = run(Model(Seer(), source="runs/seer"))
    assert report.judge == "runs/seer" and report.score("real", "Hair").value == 1.0
    assert {score.images for score in report.scores} == {"real"}
    assert report.metrics()["test/judge_accuracy.Smiling"] == 1.0
    assert "| real |" in evaluation.markdown([report])


class Boaster(Seer):
    """Right about a smile on 3 of 4 pictures, and sure of all."""

    def judge(self, images):
        logits = super().judge(images) * 1e3
        wrong = images[..., band(self.world, len(self.world))].mean((1, 2, 3)) > 0.5
        logits[wrong, :2] = logits[wrong, :2].flip(1)
        return logits


def test_a_judge_that_is_too_sure_is_told_so():
    report = run(Boaster(), None, planted(records=800))
    wrong = 1 - report.plain["Smiling"]
    assert 0.15 < wrong < 0.35 and report.plain["Hair"] == 1.0
    assert report.calibration["Smiling"] == pytest.approx(wrong, abs=0.01) and report.calibration["Hair"] < 1e-6
    flat = report.metrics()
    assert flat["test/judge_ece.Smiling"] == report.calibration["Smiling"] and "judge_plain_accuracy" in " ".join(flat)
    assert "calibration error on real images: Smiling 0." in evaluation.markdown([report])


def test_networks_are_judged_in_eval_mode_and_left_as_they_were():
    class Watching(Oracle):
        def __init__(self):
            super().__init__()
            self.networks = {"one": torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(1))}
            self.networks["one"][1].eval()
            self.seen = set()

        def encode(self, images, labels):
            self.seen |= {module.training for module in self.networks["one"].modules()}
            return images

    method = Watching()
    run(method, Seer())
    assert method.seen == {False}
    assert [module.training for module in method.networks["one"].modules()] == [True, True, False]


# --- table 2 ---------------------------------------------------------------------------------------------------------


def test_fidelity_and_sliders_of_an_oracle():
    report = run(Oracle(), Seer(), tables=("swap", "fidelity"))
    assert report.fidelity["mse"].value < 1e-4 and report.fidelity["psnr"].value > 40
    assert report.fidelity["ssim"].value > 0.99 and "ms_ssim" not in report.fidelity
    for kept in report.preservation:
        assert kept.kept == 1.0 and kept.shift < 1e-4
    sliders = {(slider.attribute, slider.value): slider for slider in report.sliders}
    assert set(sliders) == {("Smiling", "1"), ("Wearing_Hat", "1"), *(("Hair", v) for v in HAIR.categories)}
    smile = sliders["Smiling", "1"]
    assert smile.monotonic == 1.0 and smile.response[0] < 0.01 and smile.response[-1] > 0.99
    assert smile.positions[0] == -2 and smile.positions[-1] == 2 and -1 < smile.effective_from < smile.effective_to < 1


def test_fidelity_and_sliders_of_an_identity():
    report = run(Identity(), Seer(), tables=("fidelity",))
    assert report.fidelity["mse"].value == 0 and not report.scores
    assert all(slider.monotonic == 0 and math.isnan(slider.effective_from) for slider in report.sliders)


def test_attributes_that_move_along_are_named():
    class Tied(Oracle):
        """A smile comes with a hat."""

        def decode(self, latent, code):
            code = code.clone()
            code[:, 2:4] = code[:, 0:2]
            return super().decode(latent, code)

    report = run(Tied(), Seer(), tables=("swap", "fidelity"))
    smile = next(p for p in report.preservation if p.attribute == "Smiling")
    assert smile.most_moved == "Wearing_Hat" and smile.most_moved_shift > 0.99
    assert smile.kept == pytest.approx(0.5)  # the hat of two others always follows
    reader = Seer()
    reader.asked = ("Smiling", "Hair")  # a judge that learnt hats only to see better does not answer for them
    smile = next(p for p in run(Tied(), reader, tables=("swap", "fidelity")).preservation if p.attribute == "Smiling")
    assert smile.kept == 1.0 and smile.most_moved == "Hair"


# --- table 3 ---------------------------------------------------------------------------------------------------------


def test_a_latent_that_holds_the_label_leaks_it_and_one_that_does_not_is_at_chance():
    train, test = planted("train", 600, seed=1), planted("test", 400, seed=2)
    leaky = run(Oracle(), None, test, tables=("leak",), train=train)
    for leak in leaky.leak:
        assert leak.value == 1.0 and leak.chance == pytest.approx(1 / ATTRIBUTES[ATTRIBUTES.index(leak.attribute)].k)
        assert (leak.probe_records, leak.records) == (600, 400)
    blind = run(Blind(), None, test, tables=("leak",), train=train)
    for leak in blind.leak:
        assert leak.value == pytest.approx(leak.chance, abs=0.08) and leak.low <= leak.value <= leak.high
    again = run(Blind(), None, test, tables=("leak",), train=train)
    assert again.leak == blind.leak, "deterministic by seed"


def test_a_constant_latent_is_exactly_at_chance():
    class Constant(Blind):
        def encode(self, images, labels):
            return torch.zeros(len(images), 4)

    report = run(Constant(), None, tables=("leak",), train=planted("train", 200, seed=1))
    assert [leak.value for leak in report.leak] == pytest.approx([0.5, 0.5, 1 / 3])


def test_the_probe_learns_what_no_straight_line_can():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 2, generator=generator)
    labels = ((points[:, 0] > 0) ^ (points[:, 1] > 0)).long()[:, None]
    preds, kinds = probe.answers(points[:2000], labels[:2000], points[2000:], [2], seed=0)
    assert probe.PROBES[int(kinds[0])] != "linear"
    assert (preds[:, 0].long() == labels[2000:, 0]).double().mean() > 0.95


def test_the_probe_finds_what_lies_on_a_shell():
    """The label says how far out a latent of 30 numbers lies, 400 of them to learn from: a network of 256 units tells less."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1500, 30, generator=generator)
    labels = (torch.rand(1500, 1, generator=generator) < 0.5).long()
    latents *= 1 + 0.5 * labels
    preds, kinds = probe.answers(latents[:500], labels[:500], latents[500:], [2], seed=0)
    assert probe.PROBES[int(kinds[0])] == "kernel"
    assert metrics.balanced_accuracy(preds[:, 0], labels[500:, 0], 2) > 0.9


def test_the_probe_finds_a_rare_attribute_among_many_features():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(3000, 1, generator=generator) < 0.06).long()
    latents = torch.randn(3000, 200, generator=generator)
    latents[:, 7] = 3 * labels[:, 0] + 0.3 * latents[:, 7]
    preds, _ = probe.answers(latents[:2000], labels[:2000], latents[2000:], [2], seed=0)
    assert metrics.balanced_accuracy(preds[:, 0], labels[2000:, 0], 2) > 0.95


def test_an_attribute_with_one_value_in_training_is_not_probed():
    train = planted("train", 200)
    train.labels[:, 1] = 0
    report = run(Oracle(), None, tables=("leak",), train=train)
    assert [leak.attribute for leak in report.leak] == ["Smiling", "Hair"]
    assert any("Wearing_Hat" in warning for warning in report.warnings)


def test_all_that_the_decoder_reads_is_probed():
    latent = (torch.ones(2, 3, 2, 2), {"skip": [torch.zeros(2, 5)], "name": "x"})
    assert measure.flat_latent(latent).shape == (2, 17)
    with pytest.raises(ValueError, match="without any tensor"):
        measure.flat_latent("x")


# --- table 4 ---------------------------------------------------------------------------------------------------------


class Reader(Seer):
    """A judge that is right, with a last layer whose input is the bands' means."""

    def __init__(self, attributes: Attributes = ATTRIBUTES) -> None:
        super().__init__(attributes)
        self.networks = {"classifier": torch.nn.Linear(SIZE, attributes.code_width)}

    def judge(self, images):
        self.networks["classifier"](images.mean((1, 2)))
        return super().judge(images)


def test_distances_tell_an_oracle_from_an_identity():
    split = planted(records=300)
    tables = ("distribution",)
    oracle, identity = (run(method, Reader(), split, tables=tables) for method in (Oracle(), Identity()))
    for report in (oracle, identity):
        assert "not to be compared with published FID" in report.features and not report.scores
        assert report.distances[0].images == "reconstruction" and report.distances[0].fid < 1e-4
        assert "not to be compared" in evaluation.markdown([report])
    far = {(d.attribute, d.to): d for d in identity.distances if d.images == "swap"}
    near = {(d.attribute, d.to): d for d in oracle.distances if d.images == "swap"}
    assert far.keys() == near.keys() and len(near) == 7
    for key, d in near.items():
        label = split.labels[:, ATTRIBUTES.index(d.attribute)]
        value = [a for a in ATTRIBUTES if a.name == d.attribute][0]
        held = (label == [value.value_name(v) for v in value.values].index(d.to)).sum()
        assert (d.records, d.real_records) == (300 - held, held)
        assert d.fid < 0.05 * far[key].fid and d.kid < 0.05 * far[key].kid
    assert oracle.metrics()["test/fid.swap.Smiling_to_1"] == near["Smiling", "1"].fid


def test_classes_of_one_attribute_or_of_several():
    split = planted(records=300, unknown=0.05)
    report = run(Oracle(), Reader(), split, tables=("distribution",), classes=(("Smiling",), ("Smiling", "Hair")))
    rows = {(c.images, c.classes): c for c in report.conditional}
    assert set(rows) == {(i, c) for i in IMAGES if i != "sample" for c in (("Smiling",), ("Smiling", "Hair"))}
    assert {c.num_classes for c in report.conditional} == {2, 6}
    for c in report.conditional:
        assert c.inception == pytest.approx(c.between * c.within) and c.within == pytest.approx(1, abs=1e-3)
        assert c.between > (1.8 if c.num_classes == 2 else 4.5)
        assert math.isnan(c.bcfid) if c.images == "real" else max(c.bcfid, c.wcfid) < 0.3
    known = (split.labels[:, [0, 2]] >= 0).all(1).sum()
    assert rows["swap", ("Smiling", "Hair")].records == rows["real", ("Smiling", "Hair")].records == known
    lazy = run(Identity(), Reader(), split, tables=("distribution",), classes=(("Smiling",), ("Smiling", "Hair")))
    swap = next(c for c in lazy.conditional if c.images == "swap" and len(c.classes) == 1)
    assert swap.wcfid > 10, "smiles asked for and not given"
    assert "Smiling + Hair" in evaluation.markdown([report])
    with pytest.raises(ValueError, match="did you mean 'Smiling'"):
        run(Oracle(), Reader(), split, tables=("distribution",), classes=[["Smilling"]])


def test_a_record_moves_to_another_class_and_never_to_its_own():
    definition = distribution.class_definitions(ATTRIBUTES, [["Hair", "Smiling"]])[0]
    split = planted(records=600, unknown=0.05)
    labels = torch.from_numpy(split.labels)
    moved = definition.moved(labels, Batch.alone(None, labels).draws)
    before, after = definition.of(labels), definition.of(moved)
    assert torch.equal(before < 0, after < 0) and torch.equal(labels[before < 0], moved[before < 0])
    assert (before != after)[before >= 0].all() and torch.equal(labels[:, 1], moved[:, 1])
    for start in range(6):
        assert set(after[before == start].tolist()) == set(range(6)) - {start}
    assert torch.equal(definition.of(torch.tensor([[1.0, 0, 2]])), torch.tensor([5]))


def test_features_come_from_a_torchscript_file_that_the_user_names(tmp_path):
    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            assert images.dtype == torch.uint8
            features = images.float().mean(1)[:, 0]
            return features if return_features else features[:, :3]

    file = tmp_path / "inception.pt"
    torch.jit.script(Network()).save(str(file))
    report = run(Oracle(), Seer(), tables=("distribution",), inception=file)
    assert report.features.startswith("inception.pt (sha256 ") and "published" not in report.features
    assert any("120 records: below 2,048" in warning for warning in report.warnings)
    (tmp_path / "not.pt").write_bytes(b"x")
    for name, message in (("not.pt", "not readable as TorchScript"), ("gone.pt", "no such file")):
        with pytest.raises(ValueError, match=message):
            run(Oracle(), Seer(), tables=("distribution",), inception=tmp_path / name)
    with pytest.raises(ValueError, match="no linear layer"):
        run(Oracle(), Seer(), tables=("distribution",))


def test_samples_are_compared_where_a_method_draws_them():
    class Sampler(Oracle):
        noise_width = 1

        def sample(self, noise, code):
            return super().decode(noise[:, :, None, None].expand(-1, 3, SIZE, SIZE).clamp(-1, 1), code)

    report = run(Sampler(), Reader(), planted(records=300), tables=("distribution",))
    sample = next(d for d in report.distances if d.images == "sample")
    assert sample.records == 300 and 0 < sample.fid < 5
    assert sum(c.images == "sample" for c in report.conditional) == len(ATTRIBUTES)


# --- table 5 ---------------------------------------------------------------------------------------------------------


def fader(attributes: Attributes = ATTRIBUTES) -> Method:
    from fader.methods.fader import Fader, FaderSettings

    torch.manual_seed(0)
    return Fader(FaderSettings(init_channels=4, max_channels=8, num_layers=3), attributes, SIZE)


def test_cost_counts_parameters_and_operations_worked_by_hand():
    class Small(Oracle):
        def __init__(self):
            super().__init__()
            encoder, decoder = torch.nn.Conv2d(3, 8, 4, 2, 1), torch.nn.ConvTranspose2d(8, 3, 4, 2, 1)
            self.networks = {"encoder": encoder, "decoder": decoder}

        def encode(self, images, labels):
            return self.networks["encoder"](images)

        def decode(self, latent, code):
            return self.networks["decoder"](latent)

    cost = run(Small(), None, tables=("cost",)).cost
    assert cost["parameters"] == {"encoder": 3 * 8 * 16 + 8, "decoder": 3 * 8 * 16 + 3}
    assert cost["encode_flops"] == 2 * 3 * 8 * 16 * 64 == cost["decode_flops"]
    assert cost["encode_images_per_second"] > 0 and cost["decode_images_per_second"] > 0


# --- ranks -----------------------------------------------------------------------------------------------------------


class Ranks:
    """A sum over threads that stand for ranks."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.lock = threading.Lock()
        self.total: torch.Tensor | None = None
        self.world_size, self.rank = world_size, 0

    def seen_by(self, rank: int) -> Ranks:
        """As this rank knows them."""
        own = copy.copy(self)
        own.rank, own.reduce_sum = rank, self.reduce_sum
        return own

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.total = tensor.clone() if self.total is None else self.total + tensor
        self.barrier.wait()
        total = self.total.clone()
        if self.barrier.wait() == 0:
            self.total = None
        self.barrier.wait()
        return total


@pytest.mark.parametrize("world_size", [2, 5])
def test_every_rank_gets_the_numbers_of_one(world_size):
    """With five ranks two have no batch at all (120 records in batches of 50)."""
    train, method = planted("train", 150, seed=1), fader()
    tables = ("swap", "fidelity", "leak", "distribution")
    given = {"tables": tables, "train": train, "classes": [["Smiling", "Hair"], ["Wearing_Hat"]]}
    torch.manual_seed(1)
    reader = Reader()
    alone = run(method, reader, **given)
    ranks, reports = Ranks(world_size), {}

    def work(rank: int) -> None:
        reports[rank] = run(
            copy.deepcopy(method),
            copy.deepcopy(reader),
            **given,
            ranks=ranks.seen_by(rank),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == world_size
    expected = alone.metrics()
    assert 0 < expected["test/swap_accuracy"] < 1 and expected["test/leak.Smiling"] > 0.5
    for report in reports.values():
        found = report.metrics()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_another_device_gives_the_numbers_of_the_cpu(other_device):
    train, method = planted("train", 150, seed=1), fader()
    given = {"tables": evaluation.TABLES, "train": train, "classes": (("Smiling", "Hair"),)}
    reader = Reader()
    cpu, other = (run(method, reader, device=str(device), **given).metrics() for device in ("cpu", other_device))
    assert cpu.keys() == other.keys()
    for name, value in cpu.items():  # a probe's training amplifies rounding
        assert other[name] == pytest.approx(value, rel=1e-3, abs=0.05 if "leak" in name else 1e-3), name


# --- what training asks for -------------------------------------------------------------------------------------------


def test_without_intervals_every_number_is_the_same():
    split, train = planted(unknown=0.2), planted("train", 150, seed=1)
    given = {"split": split, "train": train, "tables": ("swap", "fidelity", "leak")}
    for method in (OneWay(), fader()):
        whole, short = run(method, Seer(), **given), run(method, Seer(), **given, resamples=0)
        assert whole.metrics() == short.metrics()
        assert all(math.isnan(score.low) and math.isnan(score.high) for score in short.scores)
        assert "(" not in short_cell(short) and "(" in short_cell(whole)
    error = run(fader(), None, split, tables=("error",)).metrics()
    assert error == {name: whole.metrics()[name] for name in ("test/mse", "test/psnr")}


def short_cell(report) -> str:
    return evaluation.as_tables([report])[0].rows[0][1]


def test_a_record_that_does_not_decode_is_left_out_and_its_stand_in_counts_once(monkeypatch):
    """Row 7 does not decode, row 60 stands in for it, of the other batch: both ranks measure that one."""
    split, method = planted(), fader()
    rows = np.arange(120)
    rows[7] = 60
    batches = MemoryLoader.batches

    def damaged(self, requests):
        requests = [dataclasses.replace(request, rows=rows[request.rows]) for request in requests]
        return batches(self, requests)

    monkeypatch.setattr(MemoryLoader, "batches", damaged)
    ranks, reports = Ranks(2), {}

    def work(rank: int) -> None:
        asked = {"tables": ("swap", "error"), "batch_size": 60, "ranks": ranks.seen_by(rank)}
        reports[rank] = run(copy.deepcopy(method), Seer(), split, **asked)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(MemoryLoader, "batches", batches)
    kept = np.delete(np.arange(120), 7)
    without = run(method, Seer(), Split("test", split.labels[kept], split.pixels[kept]), tables=("swap", "error"))
    assert reports[0].metrics() == reports[1].metrics() == pytest.approx(without.metrics(), abs=1e-9)
    assert "1 records do not decode and are left out" in reports[0].warnings


@pytest.mark.parametrize("tables", [("swap", "error"), ("swap", "fidelity", "leak"), ("error",), ("leak", "fidelity")])
@pytest.mark.parametrize("kind", ["fader", "fader alone", "sampler", "judge", "fader of twins"])
def test_every_number_is_named_before_it_is_measured(kind, tables, tmp_path):
    method = {"sampler": Noise, "judge": Seer}.get(kind, fader)()
    judge, path = Seer() if kind in ("fader", "sampler") else None, Shards.path
    if kind == "fader of twins":
        judge, path = Seer(), twinned(tmp_path, planted())
    shards = Shards({"test": planted()}, path=path)
    if kind == "sampler" and tables == ("error",) or kind == "fader alone" and "swap" in tables:
        with pytest.raises(ValueError, match="reconstructs nothing: no error table|no judge"):
            evaluation.quantities(Model(method), [Model(judge)] if judge else [], shards, Specification(tables=tables))
        return
    report = run(method, judge, train=planted("train", 150, seed=1), path=path, tables=tables)
    names = evaluation.quantities(Model(method), [Model(judge)] if judge else [], shards, Specification(tables=tables))
    assert {name.partition("/")[2] for name in report.metrics()} == set(names) != set()
    assert ("twin_inside.Hair_black_to_grey" in names) == (kind == "fader of twins" and "fidelity" in tables)


# --- a method that samples and does not encode ------------------------------------------------------------------------


class Noise(Sham):
    """Paints what the code asks for on grey, its last band as bright as its noise."""

    name, noise_width = "noise", 1

    def sample(self, noise, code):
        grey = noise[:, :, None, None].expand(-1, 3, SIZE, SIZE).clamp(-1, 1)
        return Oracle.decode(self, grey, code)


def test_a_sampler_is_judged_by_its_samples():
    report = run(Noise(), Reader(), planted(records=300), tables=("swap", "fidelity", "leak", "distribution", "cost"))
    assert {score.images for score in report.scores} == {"real", "sample", "swap"}
    assert report.score("sample").value == report.score("swap").value == 1.0
    assert not report.fidelity and not report.leak and report.sliders and report.preservation[0].kept == 1.0
    assert [d.images for d in report.distances].count("sample") == 1 and "reconstruction" not in str(report.distances)
    assert report.cost["sample_images_per_second"] > 0 and "sample GFLOP" in evaluation.markdown([report])
    assert {"test/sample_accuracy", "test/sample_accuracy.Smiling_1", "test/swap_accuracy.Hair"} <= report.metrics().keys()
    lazy = run(type("Lazy", (Noise,), {"sample": lambda self, noise, code: Noise.sample(self, noise, code * 0)})(), Seer())
    assert lazy.score("sample", "Smiling").value == lazy.score("swap", "Smiling").value == 0.5


def test_a_samplers_records_draw_their_noise_once(monkeypatch):
    """Two swaps of one record differ by what is swapped alone, and the batch size decides nothing."""
    split, drawn = planted(), {}
    sample = Noise.sample

    def watched(self, noise, code):
        drawn.setdefault(len(noise), []).append(noise.clone())
        return sample(self, noise, code)

    monkeypatch.setattr(Noise, "sample", watched)
    for size in (120, 40):
        run(Noise(), Seer(), split, batch_size=size)
    assert all(torch.equal(noise, drawn[120][0]) for noise in drawn[120]) and len(set(drawn[120][0].flatten().tolist())) > 100
    assert torch.equal(drawn[40][0], drawn[120][0][:40])


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_is_plain_data_with_flat_metrics():
    report = run(Oracle(), Seer(), tables=("swap", "fidelity", "leak", "cost"), train=planted("train", 200, 1))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert "after 32,000 images" in evaluation.markdown([report])
    assert data["split"] == "test" and data["metrics"]["test/swap_accuracy.Hair_grey_to_black"] == 1.0
    flat = report.metrics()
    for name in ("swap_accuracy", "swap_accuracy.Smiling", "swap_accuracy.Smiling_to_1", "mse", "leak.Hair"):
        assert f"test/{name}" in flat
    assert flat["test/judge_accuracy.Smiling_1"] == 1.0


def test_tables_stand_side_by_side_with_real_images_once():
    a = run(Model(Oracle(), source="runs/a"), Seer(), tables=("swap", "fidelity", "cost"))
    b = run(Model(Identity(), source="runs/b"), Seer(), tables=("swap", "fidelity"))
    text = evaluation.markdown([a, b])
    summary = next(table for table in evaluation.as_tables([a, b]) if table.title.startswith("1."))
    assert [row[0] for row in summary.rows] == ["real", "a reconstruction", "a swap", "b reconstruction", "b swap"]
    assert summary.header == ["images", *ATTRIBUTES.names, "mean"]
    assert summary.rows[2][1].startswith("1.000 (1.000") and summary.rows[4][1].startswith("0.000")
    assert "FadNet Swap" in text and "31.4" in text and "human raters" in text
    for table in evaluation.as_tables([a, b]):
        assert all(len(row) == len(table.header) for row in table.rows), table.title


def test_the_field_s_thirteen_attributes_stand_beside_what_was_published():
    report = run(Oracle(), Seer(), tables=("swap", "fidelity"))
    accuracies = {"real": 0.875, "swap": 0.75}  # of these alone; the mean over all that the model changes is 1
    renamed = [
        dataclasses.replace(report.score(images), attribute=name, value=value)
        for images, value in accuracies.items()
        for name in published.THIRTEEN
    ]
    title = "As published, in percent: thirteen attributes"
    assert title not in [table.title for table in evaluation.as_tables([report])]
    thirteen = dataclasses.replace(report, scores=[*report.scores, *renamed])
    rows = next(table.rows for table in evaluation.as_tables([thirteen]) if table.title == title)
    assert rows[0] == ["STGAN", "94.50", "86.05", "31.67", "0.948"]
    psnr, ssim = (report.fidelity[name].value for name in ("psnr", "ssim"))
    assert rows[2][1:] == ["87.50", "75.00", f"{psnr:.2f}", f"{ssim:.3f}"]


def test_a_number_that_is_not_there_is_asked_for():
    with pytest.raises(ValueError, match="no swap accuracy of Moustache"):
        run(Oracle(), Seer()).score("swap", "Moustache")
