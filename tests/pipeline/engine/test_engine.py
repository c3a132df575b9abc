"""The engine: only the named networks move, non-finite updates change nothing, averages follow, state comes back."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Iterator

import pytest
import torch

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Batch, Clock, Loss, Method, Optimizer, Phase, Stage
from pipeline.config import EngineConfig
from pipeline.engine import Engine, LossScale
from pipeline.engine.launcher import OTHER_WAYS, refuse_leftovers
from pipeline.engine.ranks import restarts_may_hang
from tests.fader.tiny import small
from tests.shams import SGD, SHAMS, ShamSettings, registered

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
    if name == "fader":
        more = {"num_layers": 2, "patch": {"weight": 0.1}, "classifier": {"weight": 0.1}, "latent": {"weight": 0.1}}
        return kind(small(kind.Settings(), **{"images": 64, **more, **settings}), ATTRIBUTES, SIZE)
    sizes = {key: value for key, value in SMALL.items() if key in kind.Settings.__dataclass_fields__}
    return kind(kind.Settings(**{"images": 64, **sizes, **settings}), ATTRIBUTES, SIZE)


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


def test_a_solved_critic_notes_batches_of_its_own_beside_the_discriminators():
    method = tiny("fader", solved={"weight": 0.1, "steps": 3, "half_life": 10**9})
    engine, (stage,) = Engine(method), method.stages()
    (looks,) = [phase for phase in stage.phases if not phase.trains]
    assert (looks.name, looks.repeat) == ("critic", 3)
    critic, before = method.networks["critic"], weights(method)
    engine.update(looks, batch(), Clock())
    assert moved(before, method, parameters_only=False) == {"critic"}
    for phase in (phase for phase in stage.phases if phase.trains):
        engine.update(phase, batch(1), Clock())
    assert critic.count.item() == pytest.approx(2 * 8)
    alone = tiny("fader", solved={"weight": 0.1})
    assert not [phase for phase in alone.stages()[0].phases if not phase.trains]


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


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("aligner", "regressor/error"), ("fader", "autoencoder/mse"), ("judge", "classifier/loss")],
)
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
    torch.testing.assert_close(state.ema["net/1.running_mean"], (1 - half) * state.networks["net/1.running_mean"])
    assert torch.equal(state.ema["net/1.num_batches_tracked"], state.networks["net/1.num_batches_tracked"])


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

    unbroken = Engine(tiny(name, **({"ema_half_life": 20} if name in ("aligner", "fader", "judge") else {})))
    update(unbroken, 0)
    resumed = Engine(tiny(name, **({"ema_half_life": 20} if name in ("aligner", "fader", "judge") else {})))
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
    with pytest.raises(ValueError, match="of other networks: autoencoder/1.bias is 3 there and missing here"):
        Engine(tiny("sham_penalised")).load(state)


def test_a_state_of_another_shape_is_refused_in_words_and_changes_nothing():
    small, large = Engine(tiny("fader", init_channels=4)), Engine(tiny("fader", init_channels=8))
    before = {name: value.clone() for name, value in large.networks.state_dict().items()}
    with pytest.raises(ValueError, match=r"\S+ is [\d×]+ there and [\d×]+ here.*begin a run in another folder") as error:
        large.load(small.state())
    assert "state_dict" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in large.networks.state_dict().items())


@pytest.mark.parametrize("norm", ["global", "local"])
def test_a_batch_without_variance_is_refused_in_words(norm):
    """One record that the encoder halves down to one pixel."""
    engine = Engine(tiny("fader", num_layers=5, norm=norm))
    phase = engine.method.stages()[0].phases[-1]
    with pytest.raises(ValueError, match="raise batch_size"):
        engine.update(phase, batch(records=1), Clock())


@pytest.mark.parametrize(
    "left",
    ["RANK=1", "LOCAL_RANK=1", "RANK=0 LOCAL_RANK=0", "WORLD_SIZE=2", "PMI_SIZE=2", "OMPI_COMM_WORLD_SIZE=4 MASTER_PORT=1",
     "MASTER_ADDR=127.0.0.1 RANK=1", "MASTER_ADDR=127.0.0.1 WORLD_SIZE=abc", "MASTER_ADDR=a WORLD_SIZE=2 RANK=0 MASTER_PORT=x"],
)  # fmt: skip
def test_variables_of_half_a_launch_are_refused_by_name(monkeypatch, left):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for harmless in ("MASTER_PORT=29500", "MASTER_ADDR=127.0.0.1", "WORLD_SIZE=1", "LOCAL_RANK=-1", "RANK=0"):
        with monkeypatch.context() as patch:
            patch.setenv(*harmless.split("="))
            refuse_leftovers()
    for part in left.split():
        monkeypatch.setenv(*part.split("="))
    with pytest.raises(ValueError, match=f"{left.split()[-1].partition('=')[0]}.*left over: 'unset .*"):
        Engine(tiny("sham_quantised"))
    for name, value in zip(("MASTER_ADDR", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"), ("a", "2", "0", "0", "1")):
        monkeypatch.setenv(name, value)
    refuse_leftovers()


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_a_way_of_training_that_a_launcher_asks_for_and_nobody_knows_is_refused(monkeypatch, way):
    monkeypatch.setenv(OTHER_WAYS[way], "inductor" if "DYNAMO" in OTHER_WAYS[way] else "true")
    with pytest.raises(ValueError, match="name a file, as --config_file launch/accelerate/one_node.yaml"):
        Engine(tiny("sham_quantised"))
    monkeypatch.setenv(OTHER_WAYS[way], "no" if "DYNAMO" in OTHER_WAYS[way] else "false")
    Engine(tiny("sham_quantised"))


def test_a_network_in_two_groups_is_refused():
    method = tiny("sham_sampler")
    method.optimizers = lambda: {("critic",): SGD, ("critic", "generator"): SGD, ("encoder",): SGD}
    with pytest.raises(ValueError, match="critic stands in two trained groups"):
        Engine(method)


def test_a_launcher_that_names_another_precision_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="launcher says mixed precision fp16"):
        Engine(tiny("sham_quantised"), precision="bf16")


def launcher_says(monkeypatch, **words: str) -> None:
    """The environment that `accelerate launch --use_deepspeed` leaves its processes."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in words.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ({}, {"backend": "ddp"}, "the launcher says DeepSpeed, the experiment says engine.backend: ddp"),
        ({"DEEPSPEED_ZERO_STAGE": "3"}, {}, "ZeRO-3 is refused: it cuts up the weights themselves"),
        ({"DEEPSPEED_ZERO_STAGE": "1"}, {"zero_stage": 2}, "the launcher says ZeRO stage 1, the experiment says"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "ask for offload_optimizer"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation_steps 4, the experiment says"),
        ({"GRADIENT_CLIPPING": "1.0"}, {}, "gradient_clipping 1, the method clips at 0"),
        ({"MIXED_PRECISION": "bf16"}, {}, "the launcher says mixed precision bf16, the experiment says"),
        ({"DEEPSPEED_CONFIG_FILE": "nowhere.json"}, {}, "nowhere.json is not readable as JSON"),
    ],
)
def test_a_launcher_that_contradicts_the_experiment_is_refused(monkeypatch, words, settings, says):
    launcher_says(monkeypatch, **words)
    with pytest.raises(ValueError) as error:
        Engine(tiny("sham_quantised"), settings=EngineConfig(**settings))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO-3 is refused"),
        ({"bf16": {"enabled": True}}, "the launcher's DeepSpeed file enables bf16, the experiment says"),
        ({"optimizer": {"type": "Adam"}}, "names optimizer; the experiment owns it (the method's optimizers)"),
        ({"train_batch_size": 64}, "names train_batch_size; the experiment owns it (batch_size)"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "ask for offload_param"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_experiment_is_refused(monkeypatch, tmp_path, tree, says):
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    launcher_says(monkeypatch, DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))
    with pytest.raises(ValueError) as error:
        Engine(tiny("sham_quantised"))
    assert says in str(error.value)


def test_fp16_without_cuda_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(ValueError, match="precision: fp16 needs CUDA"):
        Engine(tiny("sham_quantised"), precision="fp16")


def test_a_loss_scale_halves_on_overflow_and_grows_after_a_while():
    scale = LossScale(torch.device("cpu"), 4.0)
    bad, good = torch.tensor(0.0), torch.tensor(1.0)
    assert [float(scale.update(bad)) for _ in range(3)] == [0.0, 0.0, 1.0], "only where nothing is scaled is it a fault"
    assert float(scale.scale) == 1.0
    for _ in range(LossScale.INTERVAL):
        assert float(scale.scale) == 1.0
        scale.update(good)
    assert float(scale.scale) == 2.0 and float(scale.good) == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "deepspeed"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_reduced_precision_learns_on_cuda_and_its_state_comes_back(backend, precision):
    settings = EngineConfig(backend=backend, zero_stage=1 if backend == "deepspeed" else None)

    def engine() -> Engine:
        return Engine(tiny("judge"), precision=precision, settings=settings)

    def update(engine: Engine, k: int) -> dict[str, torch.Tensor]:
        one = batch(k)
        one = Batch.alone(one.images.to(engine.device), one.attributes.to(engine.device), seed=k)
        return engine.update(engine.method.stages()[0].phases[0], one, Clock(images=8 * k))

    first = engine()
    reports = [update(first, k % 2) for k in range(60)]
    assert float(reports[-1]["classifier/loss"]) < 0.9 * float(reports[0]["classifier/loss"])
    assert sum(float(report["classifier/skipped"]) for report in reports) == 0
    second = engine()
    second.load(first.state())
    update(first, 60), update(second, 60)
    a, b = first.state(), second.state()
    assert a.optimizers.keys() == b.optimizers.keys()
    assert ("classifier/loss_scale" in a.optimizers) == (precision == "fp16")
    for key in a.networks:
        torch.testing.assert_close(a.networks[key], b.networks[key], rtol=1e-3, atol=1e-3)


def doubled(name: str) -> Method:
    method = tiny(name)
    for network in method.networks.values():
        network.double()
    return method


@pytest.mark.parametrize("name", ["sham_sampler", "sham_penalised"])
def test_a_batch_taken_in_parts_is_the_batch(name):
    """Uneven parts too: three of eight records."""
    whole, parts = (Engine(doubled(name), settings=EngineConfig(accumulation=k)) for k in (1, 3))
    for engine in (whole, parts):
        for k in range(3):
            for phase in engine.method.stages()[0].phases:
                one = batch(k)
                wide = {name: getattr(one, name).double() for name in ("images", "attributes", "size", "known")}
                report = engine.update(phase, dataclasses.replace(one, **wide), Clock())
                assert report[f"{phase.name}/skipped"] == 0
    a, b = whole.state().networks, parts.state().networks
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-12


def test_more_parts_than_records_are_refused():
    engine = Engine(tiny("sham_penalised"), settings=EngineConfig(accumulation=9))
    with pytest.raises(ValueError, match="8 records of a rank cannot be taken in 9 parts"):
        engine.update(engine.method.stages()[0].phases[0], batch(), Clock())


@pytest.mark.parametrize(
    ("settings", "images", "factor"),
    [
        ({}, 0, 1.0),
        ({"lr_scaling": "linear", "reference_batch_size": 2}, 0, 4.0),
        ({"lr_scaling": "sqrt", "reference_batch_size": 2}, 0, 2.0),
        ({"warmup_images": 32}, 0, 0.25),
        ({"warmup_images": 32}, 8, 0.5),
        ({"warmup_images": 32}, 64, 1.0),
        ({"lr_scaling": "linear", "reference_batch_size": 2, "warmup_images": 32}, 8, 2.0),
    ],
)
def test_learning_rates_follow_batch_size_and_warm_up(settings, images, factor):
    """With SGD and no clipping a step is the rate times the gradient, which is the same in every case."""
    def moved_by(settings: EngineConfig) -> torch.Tensor:
        method = tiny("sham_quantised")
        engine = Engine(method, settings=settings)
        before = weights(method)["autoencoder"]["1.weight"]
        engine.update(method.stages()[0].phases[0], batch(), Clock(images=900, stage_images=images))
        return method.networks["autoencoder"][1].weight.detach() - before

    found, plain = moved_by(EngineConfig(**settings)), moved_by(EngineConfig())
    torch.testing.assert_close(found, factor * plain, rtol=1e-3, atol=1e-6)


def test_a_groups_own_decay_multiplies_its_rate():
    def moved_by(stage_images: int, **decay: int) -> torch.Tensor:
        method = tiny("sham_quantised")
        groups = {trains: dataclasses.replace(o, **decay) for trains, o in method.optimizers().items()}
        method.optimizers = lambda: groups
        before = weights(method)["autoencoder"]["1.weight"]
        Engine(method).update(method.stages()[0].phases[0], batch(), Clock(images=9, stage_images=stage_images))
        return method.networks["autoencoder"][1].weight.detach() - before

    plain = moved_by(0)
    for images, factor in ((40, 1.0), (50, 0.75), (80, 0.0)):
        found = moved_by(images, decay_from=40, decay_images=40)
        torch.testing.assert_close(found, factor * plain, rtol=1e-3, atol=1e-6)


def test_dropout_is_keyed_by_stream_and_draw():
    method = tiny("judge", dropout=0.5)
    engine = Engine(method)
    phase = method.stages()[0].phases[0]
    fixed = copy.deepcopy(engine.state())

    def loss(draw: int) -> float:
        engine.load(fixed)
        one = batch()
        one = Batch.alone(one.images, one.attributes, draw=draw)
        return float(engine.update(phase, one, Clock())["classifier/loss"])

    assert loss(3) == loss(3) != loss(4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is computed on the processor")
def test_bf16_on_a_processor_without_it_is_said_to_be_slow(monkeypatch, caplog):
    monkeypatch.setattr("pipeline.engine.engine._has_bf16", lambda: False)
    Engine(tiny("judge"), precision="fp32")
    assert "bf16" not in caplog.text
    Engine(tiny("judge"), precision="bf16")
    assert "expect a twentieth of the speed of precision: fp32" in caplog.text


@pytest.mark.parametrize(
    ("restarts", "ranks", "shared", "hangs"),
    [("3", "2", "True", True), ("3", "2", "False", False), ("0", "2", "True", False), ("3", "1", "True", False)],
)
def test_a_launcher_whose_restarts_may_hang_is_known_by_its_environment(restarts, ranks, shared, hangs):
    launched = {"TORCHELASTIC_MAX_RESTARTS": restarts, "WORLD_SIZE": ranks, "TORCHELASTIC_USE_AGENT_STORE": shared}
    assert restarts_may_hang(launched) is hangs
    assert not restarts_may_hang({})
