"""The panel of judges, with the fault planted that it is for: pictures that please one judge's eye and show nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fader.attributes import Attribute, Attributes
from fader.filters import blurred
from fader.method import Batch, Context, Method
from fader.methods.judge import Judge, JudgeSettings
from pipeline import config, models
from pipeline.config import AugmentConfig
from pipeline.data.datasets.faces import draw_face
from pipeline.evaluation import markdown, promotion
from pipeline.images import Preprocessing, preprocess, to_float
from pipeline.loading.augmentation import augmented
from pipeline.training.validation import named_judges
from tests.pipeline.evaluation.test_evaluation import Model as sham_model
from tests.pipeline.evaluation.test_evaluation import NoSettings, Oracle, OtherSeer, Seer, Split, run
from tests.runs import FADER, JUDGE, make_run

SMILING = Attributes([Attribute("Smiling")])
SIGHT = Preprocessing(32, "celeba")
TRAINED, TESTED = 500, 160
GREY_LEVELS = 4
AUGMENT = {
    "official": AugmentConfig(translation=0.06, brightness=0.2, contrast=0.3, blur=1.6, rescaling=0.5),
    "residual": AugmentConfig(translation=0.06, brightness=0.2, contrast=0.3, blur=1.6, rescaling=0.5, noise=0.1),
}


def drawn(index: int, smiling: int) -> np.ndarray:
    return preprocess(draw_face(11, index, Smiling=smiling), SIGHT)


def trained(name: str, preset: str, rate: float, steps: int, images: torch.Tensor, labels: torch.Tensor) -> models.Model:
    """A judge that has learnt from some faces."""
    torch.manual_seed(7001)
    method = Judge(JudgeSettings(preset=preset, prior="data"), SMILING, SIGHT.image_size)
    networks = torch.nn.ModuleDict(method.networks)
    optimizer = torch.optim.Adam(method.networks["classifier"].parameters(), rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    chance = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(images), (32,), generator=chance)
        batch = Batch.alone(images[rows], labels[rows], draw=step)
        batch = dataclasses.replace(batch, images=augmented(batch.images, batch.draws, AUGMENT[name]))
        optimizer.zero_grad()
        method.classifier_loss(networks, batch, Context()).value.backward()
        optimizer.step()
        falling.step()
    networks.eval().requires_grad_(False)
    return models.Model(method, {"config": {"seed": 7001}}, SMILING, SIGHT, (), f"runs/{name}")


@pytest.fixture(scope="module")
def panel() -> list[models.Model]:
    labels = np.random.default_rng(0).integers(0, 2, TRAINED)
    faces = [drawn(index, int(label)) for index, label in enumerate(labels)]
    seen = to_float(torch.from_numpy(np.stack(faces))), torch.from_numpy(labels)[:, None].float()
    return [trained("residual", "small_residual", 2e-3, 600, *seen), trained("official", "small", 1e-3, 400, *seen)]


@pytest.fixture(scope="module")
def twins() -> tuple[Split, torch.Tensor]:
    """Faces that no judge has seen, as a split; and their twins, with the other value of Smiling."""
    labels = [index % 2 for index in range(TESTED)]
    pixels, others = (
        torch.from_numpy(np.stack([drawn(TRAINED + index, label ^ changed) for index, label in enumerate(labels)]))
        for changed in (0, 1)
    )
    return Split("test", np.array(labels, np.float32)[:, None], pixels, SMILING), others


class Redrawn(Method):
    """Decodes the photo itself, and for the other value its true twin."""

    name, Settings = "redrawn", NoSettings

    def __init__(self, twins: tuple[Split, torch.Tensor]) -> None:
        super().__init__(NoSettings(), SMILING, SIGHT.image_size)
        split, others = twins
        own, changed = to_float(split.pixels), to_float(others)
        self.by_photo = {photo.numpy().tobytes(): (photo, twin) for photo, twin in zip(own, changed)}

    def optimizers(self):
        return {}

    def encode(self, images, labels):
        pairs = [torch.stack(self.by_photo[image.contiguous().numpy().tobytes()]) for image in images]
        return torch.stack(pairs), labels

    def decode(self, latent, code):
        pairs, labels = latent
        changed = (code.argmax(1) != labels[:, 0]).long()
        return pairs[torch.arange(len(pairs)), changed]


class Pleaser(Redrawn):
    """Leaves the photo alone but for 4 grey levels at most, which please both readings of one judge."""

    def __init__(self, twins: tuple[Split, torch.Tensor], judge: models.Model) -> None:
        super().__init__(twins)
        self.judge_method = judge.method

    def decode(self, latent, code):
        with torch.inference_mode(False), torch.enable_grad():
            photos, wanted = latent[0][:, 0].clone(), code.argmax(1).clone()
            most, change = GREY_LEVELS / 127.5, torch.zeros_like(photos)
            for _ in range(10):
                change.requires_grad_(True)
                shown = (photos + change).clamp(-1, 1)
                logits = [self.judge_method.judge(seen) for seen in (shown, blurred(shown, models.BLUR))]
                (slope,) = torch.autograd.grad(sum(torch.nn.functional.cross_entropy(one, wanted) for one in logits), change)
                change = (change.detach() - most / 5 * slope.sign()).clamp(-most, most)
            return (photos + change).clamp(-1, 1)


def model(method: Method) -> models.Model:
    return dataclasses.replace(sham_model(method, SIGHT), card={"config": {"seed": 0}, "images_seen": 1})


def readings(report) -> list[float]:
    return [report.reading(reader, "swap", "Smiling") for reader in report.readers]


def test_pictures_that_only_please_a_judges_eye_are_found_out(panel, twins):
    residual, official = panel
    pleaser = model(Pleaser(twins, official))
    alone = run(pleaser, [official], twins[0])
    assert min(readings(alone)) >= 0.9 and not alone.flattered, "one judge alone is fooled, blurred or not"
    check_that_nobody_knows(alone)
    report = run(pleaser, panel, twins[0])
    assert report.readers == ["residual", "residual, blurred", "official", "official, blurred"]
    assert readings(report)[2:] == readings(alone) and max(readings(report)[:2]) <= 0.2
    lowest = report.score("swap", "Smiling")
    assert lowest.value == min(readings(report)) <= 0.2 and lowest.reader.startswith("residual")
    assert report.metrics()["test/swap_accuracy.Smiling"] == lowest.value
    (flattery,) = report.flattered
    assert flattery.pleased.startswith("official") and flattery.other.startswith("residual") and flattery.low > 0.5
    assert "Smiling is FLATTERED" in markdown([report]) and report.tags()["flattered"] == "Smiling"
    assert any("flattered" in reason for reason in promotion.reasons_against(report, None, []))
    assert promotion.tags(report, [])["promotion.flattered"] == "Smiling"


def check_that_nobody_knows(report) -> None:
    [warning] = [warning for warning in report.warnings if warning.startswith("whether swaps are flattered is NOT KNOWN")]
    assert warning in markdown([report])
    assert report.tags()["flattered"] == promotion.tags(report, [])["promotion.flattered"] == "not known"
    [reason] = promotion.reasons_against(report, None, [])
    assert "flattered is not known" in reason and f"({report.judge}): name two of different builds (--judge JUDGE,OTHER" in reason


def test_judges_of_one_build_cannot_tell_what_is_flattered():
    for judges in ([Seer()], [Seer(), sham_model(Seer(), source="runs/copied")]):
        check_that_nobody_knows(run(Oracle(), judges))
    judging, sampled = run(Seer()), run(Oracle(), tables=("fidelity",))
    assert judging.tags() == sampled.tags() == {} and not judging.warnings, "where nothing is swapped nobody is asked"
    assert promotion.reasons_against(judging, None, []) == promotion.reasons_against(sampled, None, []) == []


def test_true_twins_are_read_alike_by_all_readers(panel, twins):
    report = run(model(Redrawn(twins)), panel, twins[0])
    assert max(readings(report)) - min(readings(report)) <= 0.03 and min(readings(report)) >= 0.94, readings(report)
    assert report.flattered == [] and report.tags()["flattered"] == "none"
    assert report.builds == ["Classifier", "ResidualClassifier"] and promotion.reasons_against(report, None, []) == []


def test_a_lowest_reader_that_prefers_swaps_to_real_pictures_asks_for_a_look():
    """Of the planted pictures a fifth carries a wrong label, and the oracle's swaps are always read as asked."""
    from tests.pipeline.evaluation.test_evaluation import planted

    split = planted(records=300)
    split.labels[::5, 0] = 1 - split.labels[::5, 0]
    report = run(Oracle(), [Seer(), sham_model(OtherSeer(), source="runs/other")], split)
    assert report.look_at_grid == ["Smiling"] and "look at the grid" in markdown([report])
    assert promotion.reasons_against(report, None, []) == [], "labels may be noisy, so it blocks nothing"


def test_a_judge_that_started_as_the_run_did_or_gave_it_weights_is_refused(panel, twins):
    residual, official = panel
    alike = model(Redrawn(twins))
    alike.card["config"]["seed"] = 7001
    with pytest.raises(ValueError, match="official was trained with seed 7001, as runs/sham is"):
        run(alike, [official], twins[0])
    taken = model(Redrawn(twins))
    taken.method.networks = {"classifier": official.method.networks["classifier"]}
    assert run(taken, [residual], twins[0]).scores
    with pytest.raises(ValueError, match="runs/sham has weights of the judge runs/official"):
        run(taken, panel, twins[0])


@pytest.mark.parametrize("validates", [0, 100])
def test_a_run_that_would_start_as_its_judge_did_does_not_begin(validates, tmp_path):
    judges = [str(make_run(tmp_path / name, JUDGE)) for name in ("official", "other")]
    tree = {"name": "run", "method": FADER, "data": {"path": "nowhere", "attributes": ["*"], "image_size": 32}, "judge": judges}
    experiment = config.build({**tree, "run": {"evaluate_images": validates}}, "test")
    assert [judge.source for judge in named_judges(experiment)] == (judges if validates else [])
    with pytest.raises(ValueError, match="official was trained with seed 7001, as run is"):
        named_judges(experiment.model_copy(update={"seed": 7001}))


def test_a_classifier_among_the_losses_is_said():
    class Taught(Oracle):
        def optimizers(self):
            return {("encoder", "classifier"): None}

    reports = [run(method(), Seer()) for method in (Taught, Oracle)]
    assert ["a classifier was among its losses" in " ".join(report.warnings) for report in reports] == [True, False]
