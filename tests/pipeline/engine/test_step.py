"""The prepared step: every phase of every method does only what a capture takes, on the same memory each time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Batch, Clock, Loss, Method, Optimizer, Phase
from pipeline.config import EngineConfig
from pipeline.engine import Engine, LossScale, State
from pipeline.engine.groups import optimizer_of
from pipeline.engine.step import Step
from tests.capture import Refused, refusing
from tests.fader.tiny import small
from tests.shams import SGD, SHAMS, ShamSettings, registered

SIZE, RECORDS = 32, 8
MIXED = Attributes(
    [Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "short", "long")), Attribute("Age", "continuous")]
)
SMALL = {"init_channels": 4, "max_channels": 8, "hidden_channels": 8, "ema_half_life": 20}
FADER = {
    "by default": {},
    "a patch discriminator": {"patch": {"weight": 0.1}},
    "a classifier": {"classifier": {"weight": 0.1}},
    "a solved critic": {"solved": {"weight": 0.1}},
    "a solved critic with batches of its own": {"solved": {"weight": 0.1, "steps": 2, "num_hidden": 0}},
    "everything": {
        "patch": {"weight": 0.1}, "classifier": {"weight": 0.1}, "solved": {"weight": 0.1, "steps": 1}, "shared_batch": True,
        "discriminator_others": "train", "autoencoder_others": "train", "head": "sigmoid", "num_skips": 1,
        "latent": {"ramp_images": 100, "warmup_images": 8, "rise": "cosine"}, "decay_share": 0.5, "encoder_dropout": 0.1,
    },
    "an image adversary": {
        "image": {"weight": 1.0, "game": "relativistic"}, "reconstruction": {"error": "absolute"},
        "num_layers": 3, "num_skips": 1, "skip": "selective",
    },
    "no latent adversary": {"latent": {"steps": 0}, "image": {"weight": 1.0, "others": "uniform"}},
    "instance norm": {"norm": "instance", "patch": {"weight": 0.1}},
    "local norm": {"norm": "local"},
    "upsampling": {"deconv": "upsampling"},
    "pixel shuffle": {"deconv": "pixelshuffle"},
}  # fmt: skip
OTHERS = {
    "aligner": {"by default": {}},
    "cgan": {"by default": {}, "spectral norm": {"spectral_norm": True, "game": "relativistic", "deconv": "upsampling"}, "latent optimisation": {"latent_step": 0.9}, "feature quantisation": {"quantised_keys": 16}},
    "cvae": {"by default": {}},
    "icgan": {"by default": {}, "E_z reads E_y": {"variant": "ind_cond"}, "one encoder": {"variant": "sng"}},
    "vacgan": {"by default": {}, "multi-hinge": {"game": "multi_hinge"}, "even labels": {"even_labels": True}, "batch norm of others": {"others": "train", "spectral_norm": False, "norm": "local"}},
    "vaegan": {"by default": {}},
    "judge": {"by default": {}, "sigmoid and dropout": {"head": "sigmoid", "dropout": 0.3}, "local norm": {"norm": "local"}},
}
CASES = [("fader", case) for case in FADER] + [(name, case) for name, cases in OTHERS.items() for case in cases]
CASES += [(sham.name, "by default") for sham in SHAMS]


@pytest.fixture(autouse=True)
def shams() -> Iterator[None]:
    with registered():
        yield


def build(name: str, case: str = "by default", **changes) -> Method:
    kind = METHODS[name]
    torch.manual_seed(1)
    if kind.Settings is ShamSettings:
        return kind(ShamSettings(), MIXED, SIZE)
    known = {field.name for field in dataclasses.fields(kind.Settings)}
    settings = {key: value for key, value in SMALL.items() if key in known} | {"images": 64}
    if name == "fader":
        settings |= {"num_layers": 2, "latent": {"dropout": 0.3, "ramp_images": 16_000_000}}
    return kind(small(kind.Settings(), **{**settings, **{"fader": FADER, **OTHERS}[name][case], **changes}), MIXED, SIZE)


def batch(phase: Phase, draw: int, records: int = RECORDS) -> Batch:
    """Records of which each attribute's label is unknown now and then, as the phase reads them."""
    generator = torch.Generator().manual_seed(draw)
    labels = torch.rand(records, 3, generator=generator)
    labels = torch.stack([labels[:, 0].round(), (labels[:, 1] * 3).floor(), labels[:, 2]], 1)
    labels[torch.arange(3), torch.arange(3)] = -1
    images = torch.rand(records, 3, SIZE, SIZE, generator=generator) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last) if phase.source == "images" else None
    one = Batch.alone(images, labels, seed=7, stream=phase.stream, draw=draw)
    if phase.source is None:
        return dataclasses.replace(one, attributes=labels[:, :0], known=one.known[:0])
    return one


def update_all(engine: Engine, draw: int, records: int = RECORDS) -> dict[str, torch.Tensor]:
    """One update of every phase of every stage; all reports."""
    reports = {}
    for stage in engine.method.stages():
        for phase in stage.phases:
            images = draw * RECORDS
            report = engine.update(phase, batch(phase, draw, records), Clock(images, images, draw))
            reports |= {f"{phase.name}: {name}": value for name, value in report.items()}
    return reports


def tensors(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; a state dict also holds biases that lie nowhere."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def addresses(engine: Engine) -> dict[str, int]:
    """Where everything lies that a step reads or writes and that outlives it. Gradients do not: a capture owns them."""
    found = {f"weight {name}": scalar.tensor for name, scalar in engine.weights.items()}
    found |= {f"network {name}": value for name, value in tensors(engine.networks)}
    for number, step in enumerate(engine.steps.values()):
        inputs = {**vars(step.inputs), "key": step.inputs.draws.key}
        found |= {f"input {number} {k}": v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        found[f"sums of {step.phase.name}"] = step.sums.total
    for trains, group in engine.groups.items():
        found |= {f"rate of {trains}": group.rate.tensor, f"average's weight of {trains}": group.ema_weight.tensor}
        found |= {f"average {name} {k}": v for name, net in group.ema.items() for k, v in tensors(net)}
        if group.loss_scale is not None:
            found |= {f"scale of {trains}": group.loss_scale.scale, f"good of {trains}": group.loss_scale.good}
        for name, parameter in zip(group.names, group.parameters):
            found |= {f"moment {name} {k}": v for k, v in group.optimizer.state[parameter].items() if v is not None}
    return {name: tensor.data_ptr() for name, tensor in found.items()}


@contextlib.contextmanager
def capturing(monkeypatch) -> Iterator[None]:
    """While this lasts, prepared steps run as in a capture; what the host does before them does not."""
    run = Step.run

    def strict(step: Step) -> dict[str, torch.Tensor]:
        with refusing():
            return run(step)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", strict)
        yield


def test_every_method_has_its_cases():
    assert {name for name, kind in METHODS.items()} == {name for name, _ in CASES}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_phase_does_only_what_a_capture_takes_and_on_the_same_memory(name, case, monkeypatch):
    engine = Engine(build(name, case))
    update_all(engine, 0)  # optimizers make their moments in the first update
    with capturing(monkeypatch):
        update_all(engine, 1)
        before = addresses(engine)
        update_all(engine, 2)
    assert addresses(engine) == before
    state = engine.state()
    assert all(value.isfinite().all() for value in (*state.networks.values(), *state.optimizers.values()))


@pytest.mark.parametrize("with_", ["bf16", "parts", "a loss scale", "momentum", "no clipping"])
def test_so_does_every_way_of_running_it(with_, monkeypatch):
    method = build("fader", "everything")
    changes = {"momentum": {"kind": "sgd", "momentum": 0.9}, "no clipping": {"clip_norm": 0.0}}.get(with_, {})
    groups = {trains: dataclasses.replace(o, **changes) for trains, o in method.optimizers().items()}
    method.optimizers = lambda: groups
    settings = EngineConfig(accumulation=2 if with_ == "parts" else 1)
    engine = Engine(method, precision="bf16" if with_ == "bf16" else "fp32", settings=settings)
    if with_ == "a loss scale":
        for group in engine.groups.values():
            group.loss_scale = LossScale(engine.device)
    update_all(engine, 0)
    before = addresses(engine)
    with capturing(monkeypatch):
        update_all(engine, 1)
        update_all(engine, 2)
    assert addresses(engine) == before


def spoilt(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Method:
    """A judge whose loss does something with the labels on its way."""
    method = build("judge")
    stage = method.stages()[0]
    (phase,) = stage.phases

    def loss(networks, batch, context):
        found = phase.loss(networks, batch, context)
        return Loss(found.value + 0.0 * spoil(batch.attributes).sum(), found.report)

    stages = (dataclasses.replace(stage, phases=(dataclasses.replace(phase, loss=loss),)),)
    method.stages = lambda: stages
    return method


class ReadsGoingBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient.sum())


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a number read": lambda x: x * float(x[0, 0]),
    "a branch on data": lambda x: x if x.sum() > 0 else -x,
    "a comparison": lambda x: x * torch.equal(x, x),
    "a list": lambda x: x * x.tolist()[0][0],
    "an array": lambda x: x * x.numpy()[0, 0],
    "a solution that is checked": lambda x: torch.linalg.solve(torch.eye(3), x.T),
    "a selection": lambda x: x[x >= 0],
    "a selection written to": lambda x: x.clone().index_put_((x < 0,), torch.zeros(())),
    "places of ones": lambda x: x.nonzero().float(),
    "distinct values": lambda x: x.unique(),
    "repetitions": lambda x: x.repeat_interleave((x[:, 0] >= 0).long(), 0),
    "numbers of the host": lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
    "a number of the host": lambda x: x * torch.as_tensor(2.0),
    "numbers like others": lambda x: x * x.new_tensor([1.0, 2.0, 3.0]),
    "a list of places": lambda x: x[[0, 1]],
    "a number read going back": lambda x: ReadsGoingBack.apply(x.clone().requires_grad_()),
    "a seed": lambda x: (torch.manual_seed(3), x)[1],
    "a seed of torch's own generator": lambda x: (torch.default_generator.manual_seed(3), x)[1],
    "a seeded generator": lambda x: x + torch.rand(3, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_capture_refuses_is_refused(fault, monkeypatch):
    engine = Engine(spoilt(FAULTS[fault]))
    update_all(engine, 0)
    with capturing(monkeypatch), pytest.raises(Refused):
        update_all(engine, 1)


def test_what_a_capture_takes_is_not_refused(monkeypatch):
    engine = Engine(spoilt(lambda x: torch.where(x >= 0, x, 0.0) * torch.full((3,), 2.0) + x[torch.arange(8)] ** 2))
    with capturing(monkeypatch):
        update_all(engine, 0)


def inputs_move(engine: Engine) -> None:
    engine.inputs.clear(), engine.steps.clear()


def moments_move(engine: Engine) -> None:
    engine.load(engine.state())


def sums_move(engine: Engine) -> None:
    for sums in engine.sums.values():
        sums.total = sums.total.clone()


@pytest.mark.parametrize("move", [inputs_move, moments_move, sums_move])
def test_memory_that_moves_is_seen(move):
    engine = Engine(build("fader"))
    update_all(engine, 0)
    before = addresses(engine)
    kept = [*engine.inputs.values(), *(sums.total for sums in engine.sums.values())]  # so that nothing else can lie there
    kept += [dict(group.optimizer.state) for group in engine.groups.values()]
    move(engine)
    update_all(engine, 1)
    assert kept and addresses(engine) != before


# --- what a step is given, and what it gives --------------------------------------------------------------------------


def test_a_batch_of_another_size_is_taken_by_a_step_of_its_own():
    """8, 5 and 8 records, in memory that is kept and in memory that is new each time: the same weights."""
    engines = [Engine(build("fader", "everything")) for _ in range(2)]
    for draw, records in enumerate((RECORDS, 5, RECORDS)):
        for engine in engines:
            update_all(engine, draw, records)
        engines[1].steps.clear(), engines[1].inputs.clear()
    a, b = (engine.state() for engine in engines)
    for part in ("networks", "ema", "optimizers"):
        old, new = getattr(a, part), getattr(b, part)
        assert old and all(torch.equal(old[key], new[key]) for key in old), part
    assert len(engines[0].steps) == 2 * len(engines[0].method.stages()[0].phases)


def test_no_gradient_of_an_update_before_is_read():
    """So backward may make gradients anew, in memory that a capture owns."""
    engines = [Engine(build("fader", "everything"), settings=EngineConfig(accumulation=2)) for _ in range(2)]
    for draw in range(2):
        for engine in engines:
            update_all(engine, draw)
        for parameter in engines[1].networks.parameters():
            parameter.grad.fill_(torch.nan)
    a, b = (engine.state().networks for engine in engines)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_report_is_the_mean_of_what_updates_reported_and_then_begins_anew():
    engine = Engine(build("fader", "everything"))
    for draws in ((0, 1, 2), (3,)):
        reports = [update_all(engine, draw) for draw in draws]
        means, counts = engine.read_report()
        assert set(counts.values()) == {len(draws)}
        assert {name.partition(": ")[2] for name in reports[0]} == means.keys() == counts.keys()
        for name in reports[0]:
            mean = sum(float(report[name]) for report in reports) / len(reports)
            assert means[name.partition(": ")[2]] == pytest.approx(mean, rel=1e-6, abs=1e-12), name
    assert engine.read_report() == ({}, {})


def test_updates_of_repeated_phases_all_count():
    engine = Engine(build("sham_sampler"))
    for draw in range(3):
        update_all(engine, draw)
    phase = engine.method.stages()[0].phases[0]
    engine.update(phase, batch(phase, 3), Clock())
    _, counts = engine.read_report()
    assert counts["critic/skipped"] == 4 and counts["generator/skipped"] == 3


def test_momentum_begins_at_nothing_when_the_first_update_is_left_out():
    def trained(draws: tuple[int, ...], start_anew: bool) -> dict[str, torch.Tensor]:
        method = build("sham_penalised")
        method.optimizers = lambda: {("critic",): dataclasses.replace(SGD, momentum=0.9)}
        engine = Engine(method)
        if start_anew:
            state = engine.state()
            engine.load(State(state.networks, state.ema, {}))
        (phase,) = method.stages()[0].phases
        for draw in draws:
            one = batch(phase, draw)
            one.images[0] *= torch.inf if draw == 0 else 1.0
            assert engine.update(phase, one, Clock())["critic/skipped"] == (draw == 0)
        return engine.state().networks

    wanted = trained((1, 2), False)
    for start_anew in (False, True):
        found = trained((0, 1, 2), start_anew)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("gradient", [0.0, 1e3])
def test_weight_decay_of_adam_does_not_depend_on_the_gradient(gradient):
    """Loshchilov and Hutter 2019, algorithm 2: the weight shrinks by rate times decay beside Adam's own step."""
    weight = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    settings = Optimizer(learning_rate=0.1, weight_decay=0.5)
    weight.grad = torch.full_like(weight, gradient)
    optimizer_of(settings, [weight], torch.tensor(0.1)).step()
    adam = 0.1 if gradient else 0.0  # the first step of Adam is the rate, whatever the gradient
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 2.0 * (1 - 0.1 * 0.5) - adam), rtol=1e-6, atol=1e-6)
