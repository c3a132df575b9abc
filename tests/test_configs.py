"""Every experiment in configs/ loads, builds, opens with its command, and survives a round through its resolved dump."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Method
from fader.methods.judge import JudgeSettings
from fader.networks.residual import ResidualClassifier
from pipeline import config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
CELEBA = "Male Smiling Young Eyeglasses Mouth_Slightly_Open Wearing_Hat Blond_Hair".split()
CELEBA += "Bald Bangs Black_Hair Brown_Hair Bushy_Eyebrows Mustache No_Beard Pale_Skin".split()  # and these, of celeba_thirteen
K_WAY = (Attribute("Beard", "k-way", ("none", "moustache", "full")), Attribute("digit", "k-way", tuple("0123456789")))
AVAILABLE = Attributes([*map(Attribute, CELEBA), *K_WAY, Attribute("Night")])


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_builds_and_has_phases(path):
    experiment = config.load(path)
    method = config.build_method(experiment, AVAILABLE)
    assert experiment.name == path.stem
    assert all(stage.images > 0 and stage.phases for stage in method.stages())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_its_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"configs/{path.name}" in line or "make demo" in line for line in head), "no command in the first lines"
    assert any("Time" in line for line in head), "no duration in the first lines"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_resolved_dump_is_the_same_experiment(path, tmp_path):
    experiment = config.load(path)
    (tmp_path / "config.yaml").write_text(experiment.dump())
    again = config.load(tmp_path / "config.yaml")
    assert again == experiment
    assert again.digest == experiment.digest


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


GOOD = "name: x\nmethod: {name: fader, preset: small}\ndata: {path: d, attributes: [Smiling], image_size: 64}\n"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method.lattent.weight=1"], "unknown key method.lattent; did you mean method.latent?"),
        (["method.latent.wieght=1"], "unknown key method.latent.wieght; did you mean method.latent.weight?"),
        (["method.latent=1"], "method.latent has keys of its own, such as method.latent.weight (found 1)"),
        (["method.latent.weight=much"], "method.latent.weight: Input should be a valid number"),
        (["method.latent.ramp_images=null"], "method.latent.ramp_images: Input should be a valid integer"),
        (["method.latent.rise=wild"], "method.latent.rise: Input should be 'linear'"),
        (["data.atributes=[Male]"], "unknown key data.atributes; did you mean data.attributes?"),
        (["bach_size=3"], "unknown key bach_size; did you mean batch_size?"),
        (["run.kep=3"], "unknown key run.kep; did you mean run.keep?"),
        (["batch_size=many"], "batch_size: Input should be a valid integer"),
        (["batch_size=3.5"], "batch_size"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0"),
        (["seed=1000000000000000000000000000000"], "seed: Input should be less than 9223372036854775808"),
        (["method.images=[1]"], "method.images"),
        (["method.lambda_max=1"], "x.yaml: method.lambda_max is now method.latent.weight"),
        (["method.hidden_channels=8"], "is now method.latent.hidden_channels and method.classifier.hidden_channels"),
        (["method.fisher_ridge=1e-3"], "method.fisher_ridge is no more: this was taken back, see docs/log.md"),
        (["method.preset=tiny"], "method.preset"),
        (["method.latent.weight=-1"], "method.latent: weight is -1.0; it must be at least 0"),
        (["method.name=fadr"], "unknown method 'fadr'; did you mean fader?"),
        (["data.image_size='64'"], "data.image_size"),
        (["data.crop=round"], "data.crop: Input should be 'celeba', 'center' or 'letterbox' (found 'round')"),
        (["data.attributes=[]"], "data.attributes: Tuple should have at least 1 item"),
        (["data.flip=1"], "data.flip"),
        (["precision=fp8"], "precision"),
        (["engine.zero_stage=3"], "engine.zero_stage: Input should be 0, 1 or 2"),
        (["engine.zero_stag=1"], "unknown key engine.zero_stag; did you mean engine.zero_stage?"),
        (["engine.accumulation=0"], "engine.accumulation"),
        (["=3"], "is not an override"),
        (["seed"], "is not an override"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(tmp_path, overrides, says):
    path = write(tmp_path, GOOD)
    with pytest.raises(ValueError, match="(?s).*") as error:
        config.load(path, overrides)
    assert says in str(error.value)


def test_an_override_reaches_its_place(tmp_path):
    experiment = config.load(write(tmp_path, GOOD), ["method.latent.weight=2e-4", "run.folder=there", "data.flip=false"])
    assert experiment.method.latent.weight == 2e-4 and experiment.method.latent.ramp_images == 16_000_000
    assert str(experiment.folder) == "there"
    assert experiment.data.flip is False


def test_a_base_is_overridden_key_by_key_and_must_not_lead_back(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD + "seed: 4\n")
    path = write(tmp_path, "base: base.yaml\nname: top\nmethod: {latent: {weight: 0.5}}\n")
    experiment = config.load(path)
    assert (experiment.name, experiment.seed, experiment.method.latent.weight) == ("top", 4, 0.5)
    assert experiment.method.preset == "small"
    (tmp_path / "base.yaml").write_text("base: x.yaml\n" + GOOD)
    with pytest.raises(ValueError, match="leads back to itself"):
        config.load(path)


@pytest.mark.parametrize("text", ["", "- a\n", "name: [\n", "name: x\nname: y\n", "name: x\n"])
def test_what_is_no_experiment_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        config.load(write(tmp_path, text))


def test_an_attribute_the_set_does_not_have_is_refused_with_the_nearest(tmp_path):
    experiment = config.load(write(tmp_path, GOOD), ["data.attributes=[Smilling]"])
    with pytest.raises(ValueError, match="did you mean 'Smiling'"):
        config.build_method(experiment, AVAILABLE)


def test_a_missing_config_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="there is no such config file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        config.load(tmp_path)


@pytest.mark.parametrize("moved", ["rotation_degrees", "translation"])
def test_an_aligners_pictures_are_not_moved(moved):
    config.load(CONFIGS[0].parent / "celeba_aligner.yaml", ["data.augment={hue: 0.1}"])
    with pytest.raises(ValueError, match="aligner learns from how they stand"):
        config.load(CONFIGS[0].parent / "celeba_aligner.yaml", [f"data.augment={{{moved}: 0.1}}"])


class Flatterer(Method):
    """A sham whose loss would learn to please the residual classifier."""

    name, Settings = "sham_flatterer", JudgeSettings

    def __init__(self, *given):
        super().__init__(*given)
        self.networks = {"critic": nn.Sequential(ResidualClassifier(32, 2, init_channels=4, max_channels=4))}


def test_no_loss_uses_the_network_that_is_kept_for_judges(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "sham_flatterer", Flatterer)
    text = GOOD.replace("{name: fader, preset: small}", "{name: sham_flatterer, images: 8}").replace("64", "32")
    experiment = config.load(write(tmp_path, text))
    with pytest.raises(ValueError, match="sham_flatterer trains with the residual classifier, which is kept for judges"):
        config.build_method(experiment, AVAILABLE)
    judge = config.load(write(tmp_path, text.replace("sham_flatterer, images: 8", "judge, preset: small_residual")))
    assert config.build_method(judge, AVAILABLE).name == "judge"


def test_every_official_judge_has_a_residual_one_beside_it_and_no_two_configs_that_meet_have_one_seed():
    judges = {path.stem: config.load(path) for path in CONFIGS if "judge" in path.stem}
    for name, experiment in judges.items():
        if "residual" not in name:
            other = judges[name.replace("judge", "residual_judge")]
            assert other.method.is_residual and not experiment.method.is_residual
            assert other.data == experiment.data and other.seed != experiment.seed
            assert experiment.data.augment.blur and experiment.data.augment.noise and experiment.data.augment.rescaling
    assert {experiment.seed for experiment in judges.values()} == {7001, 7002}
    assert {config.load(path).seed for path in CONFIGS if "judge" not in path.stem} == {0}
