"""The engine: only the named networks move, non-finite updates change nothing, averages follow, state comes back."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Batch, Clock, Loss, Method, Optimizer, Phase, Stage
from pipeline.engine import Engine
from tests.shams import SHAMS, SGD, ShamSettings, registered

ATTRIBUTES = Attributes([Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "short", "long"))])
SIZE = 32
SMALL = {"init_channels": 4, "max_channels": 8, "hidden_channels": 8}
NAMES = sorted({*METHODS, *(sham.name for sham in SHAMS)})


@pytest.fixture(autouse=True)
def shams() -> Iterator[None]:
    with registered():
        yield


def tiny(name: str, **settings) -> Method:
    kind = METHODS[name]
    torch.manual_seed(1)
    if kind.Settings is ShamSettings:
        return kind(ShamSettings(), ATTRIBUTES, SIZE)
    extra = {"num_layers": 2, "lambda_patch": 0.1, "lambda_classifier": 0.1, "lambda_max": 0.1, "ramp_images": 0}
    return kind(kind.Settings(images=64, **SMALL, **(extra if name == "fader" else {}), **settings), ATTRIBUTES, SIZE)


def batch(seed: int = 0, records: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.arange(records) % 2, torch.arange(records) % 3], 1).float()
    images = torch.rand(records, 3, SIZE, SIZE, generator=generator) * 0.2 + (labels[:, :1, None, None] - 0.5)
    return Batch.alone(images, labels, seed=seed)


def weights(method: Method) -> dict[str, dict[str, torch.Tensor]]:
    return {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in method.networks.items()}


def moved(before: dict, method: Method, parameters_only: bool = True) -> set[str]:
    changed = set()
    for name, network in method.networks.items():
        keys = dict(network.named_parameters()) if parameters_only else network.state_dict()
        if any(not torch.equal(before[name][key], network.state_dict()[key]) for key in keys):
            changed.add(name)
    return changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_phase_moves_only_its_networks_and_no_other_holds_a_gradient(name, precision):
    method = tiny(name)
    engine = Engine(method, precision=precision)
    for phase in (phase for stage in method.stages() for phase in stage.phases):
        for network in method.networks.values():
            network.zero_grad(set_to_none=True)
        before = weights(method)
        engine.update(phase, batch(), Clock())
        assert moved(before, method) == set(phase.trains)
        holding = {n for n, m in method.networks.items() if any(p.grad is not None for p in m.parameters())}
        assert holding <= set(phase.trains)


@pytest.mark.parametrize(("name", "wanted"), [("fader", "autoencoder/mse"), ("judge", "classifier/loss")])
def test_it_learns(name, wanted):
    """Forty steps on one batch lower every reconstruction and classification loss."""
    method = tiny(name)
    groups = {t: dataclasses.replace(o, learning_rate=5e-3) for t, o in method.optimizers().items()}
    method.optimizers = lambda: groups
    engine = Engine(method)
    seen = []
    for step in range(40):
        for phase in method.stages()[0].phases:
            report = engine.update(phase, batch(), Clock(images=8 * step))
            seen += [float(report[wanted])] if wanted in report else []
    assert seen[-1] < 0.7 * seen[0]


@pytest.mark.parametrize("others", ["eval", "train"])
def test_the_networks_that_do_not_train_stand_as_the_phase_says(others):
    method = tiny("fader", autoencoder_others=others)
    engine = Engine(method)
    phase = method.stages()[0].phases[-1]
    before = weights(method)
    engine.update(phase, batch(), Clock())
    assert not method.networks["encoder"].training or "encoder" in phase.trains
    changed = moved(before, method, parameters_only=False)
    assert ("latent_discriminator" in changed) == (others == "train"), "batch-norm statistics move in train mode only"


class Explosive(Method):
    """A method whose loss is not finite where the batch's first label says so."""

    name, Settings = "explosive", ShamSettings

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.networks = {"net": torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2))}

    def loss(self, networks, batch, context):
        value = (networks["net"](batch.images) - 1).square().mean()
        return Loss(value * (torch.inf if batch.attributes[0, 0] > 0 else 1.0), {"net/loss": value.detach()})

    def optimizers(self):
        return {("net",): Optimizer(learning_rate=0.01, ema_half_life=16)}

    def stages(self):
        return (Stage("all", (Phase(("net",), self.loss),), 64),)


def test_an_update_that_is_not_finite_changes_nothing():
    method = Explosive(ShamSettings(), ATTRIBUTES, SIZE)
    engine = Engine(method)
    phase = method.stages()[0].phases[0]
    good, bad = batch(), batch()
    bad.attributes[0, 0] = 1
    good.attributes[0, 0] = 0
    engine.update(phase, good, Clock())
    before = copy.deepcopy(engine.state())
    report = engine.update(phase, bad, Clock())
    assert report["net/skipped"] == 1
    after = engine.state()
    for part in ("networks", "ema", "optimizers"):
        old, new = getattr(before, part), getattr(after, part)
        assert old and all(torch.equal(old[key], new[key]) for key in old), part
    assert engine.update(phase, good, Clock())["net/skipped"] == 0
    assert moved({"net": {k.removeprefix("net/"): v for k, v in before.networks.items()}}, method) == {"net"}


def test_the_moving_average_has_the_half_life_it_was_given():
    method = Explosive(ShamSettings(), ATTRIBUTES, SIZE)
    engine = Engine(method)
    phase = method.stages()[0].phases[0]
    start = engine.state().ema["net/0.weight"]
    good = batch()
    good.attributes[0, 0] = 0
    engine.update(phase, good, Clock())
    state = engine.state()
    half = 0.5 ** (8 / 16)
    torch.testing.assert_close(state.ema["net/0.weight"], half * start + (1 - half) * state.networks["net/0.weight"])
    assert torch.equal(state.ema["net/1.running_mean"], state.networks["net/1.running_mean"])


def test_clipping_bounds_the_whole_groups_norm():
    method = tiny("sham_quantised")
    method.optimizers = lambda: {("autoencoder",): dataclasses.replace(SGD, clip_norm=1e-3, learning_rate=1.0)}
    engine = Engine(method)
    before = weights(method)["autoencoder"]
    report = engine.update(method.stages()[0].phases[0], batch(), Clock())
    after = dict(method.networks["autoencoder"].named_parameters())
    step = sum((after[k] - before[k]).square().sum() for k in after).sqrt()
    assert report["autoencoder/gradient_norm"] > 1e-2
    assert float(step.detach()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_state_comes_back_in_another_engine(name):
    """Two updates equal one, a state carried over, and one: weights, averages and optimizers to the last bit."""
    def update(engine: Engine, k: int) -> None:
        for stage in engine.method.stages():
            for phase in stage.phases:
                engine.update(phase, batch(k), Clock(images=8 * k))

    unbroken = Engine(tiny(name, **({"ema_half_life": 20} if name in ("fader", "judge") else {})))
    update(unbroken, 0)
    resumed = Engine(tiny(name, **({"ema_half_life": 20} if name in ("fader", "judge") else {})))
    for parameter in resumed.networks.parameters():
        parameter.data.normal_()
    resumed.load(unbroken.state())
    update(unbroken, 1)
    update(resumed, 1)
    for part in ("networks", "ema", "optimizers"):
        a, b = getattr(unbroken.state(), part), getattr(resumed.state(), part)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part


def test_a_state_of_other_networks_is_refused():
    state = Engine(tiny("sham_quantised")).state()
    with pytest.raises(ValueError, match="does not fit network critic"):
        Engine(tiny("sham_penalised")).load(state)


def test_a_network_in_two_groups_is_refused():
    method = tiny("sham_sampler")
    method.optimizers = lambda: {("critic",): SGD, ("critic", "generator"): SGD, ("encoder",): SGD}
    with pytest.raises(ValueError, match="critic stands in two trained groups"):
        Engine(method)


def test_a_launcher_that_names_another_precision_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="launcher says mixed precision fp16"):
        Engine(tiny("sham_quantised"), precision="bf16")


def test_dropout_is_keyed_by_stream_and_draw():
    method = tiny("judge", dropout=0.5)
    engine = Engine(method)
    phase = method.stages()[0].phases[0]
    fixed = copy.deepcopy(engine.state())

    def loss(draw: int) -> float:
        engine.load(fixed)
        one = batch()
        draws = dataclasses.replace(one.draws, draw=draw)
        return float(engine.update(phase, dataclasses.replace(one, draws=draws), Clock())["classifier/loss"])

    assert loss(3) == loss(3) != loss(4)
