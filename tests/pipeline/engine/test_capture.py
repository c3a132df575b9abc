"""Captured and compiled steps end with the weights of eager ones: by a stand-in for CUDA's graphs here, by them on CUDA."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo

from fader.method import Clock
from pipeline.config import EngineConfig
from pipeline.engine import Engine
from pipeline.engine.capture import CapturedSteps
from tests.capture import refusing
from tests.pipeline.engine.test_step import CASES, RECORDS, batch, build, shams, update_all  # noqa: F401
from tests.shams import SGD

STEPS = CapturedSteps.WARM + 3
HERE = [("fader", "everything"), ("fader", "an image adversary"), ("judge", "sigmoid and dropout"), ("sham_quantised", "by default")]
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class StandIn:
    """Replays as a CUDA graph does: networks stand as they stood when it recorded, and nothing is asked of the host."""

    def __init__(self, engine: Engine, refuses: str = "") -> None:
        self.engine, self.refuses, self.replays, self.begun = engine, refuses, 0, 0

    def begin(self) -> None:
        self.begun += 1

    def run(self, step: Callable[[], Any]) -> Any:
        return step()

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
        if step.__self__.phase.name == self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        stood = self.standing()
        report: dict[str, torch.Tensor] = {}

        def replay() -> None:
            self.replays += 1
            now = self.standing()
            self.stand(stood)
            with refusing():
                for name, value in step().items():
                    report.setdefault(name, torch.empty_like(value)).copy_(value)
            self.stand(now)

        return replay, report

    def standing(self) -> list[tuple[bool, bool]]:
        return [
            (network.training, any(p.requires_grad for p in network.parameters())) for network in self.engine.networks.values()
        ]

    def stand(self, how: list[tuple[bool, bool]]) -> None:
        for network, (training, learns) in zip(self.engine.networks.values(), how):
            network.train(training).requires_grad_(learns)


def engine_by(name: str, case: str, step: str, refuses: str = "", settings: EngineConfig = EngineConfig()) -> Engine:
    """step: "eager"; "captured", which is the stand-in on the CPU."""
    engine = Engine(build(name, case), settings=settings.model_copy(update={"step": "eager" if step == "eager" else "auto"}))
    if step == "captured" and engine.captured is None:
        engine.captured = CapturedSteps(StandIn(engine, refuses))
    return engine


def train(engine: Engine, draws: range, records: Callable[[int], int] = lambda draw: RECORDS) -> list[dict[str, float]]:
    """All reports, read at once because a replay writes them where the last one did."""
    return [{name: float(value) for name, value in update_all(engine, draw, records(draw)).items()} for draw in draws]


def held_equal(a: Engine, b: Engine) -> None:
    for part in ("networks", "ema", "optimizers"):
        old, new = getattr(a.state(), part), getattr(b.state(), part)
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old), part


def recorded(engine: Engine) -> int:
    assert engine.captured is not None
    return len(engine.captured.recordings)


@pytest.mark.parametrize(
    ("name", "case"), [*HERE, *(pytest.param(*case, marks=ON_CUDA) for case in CASES)], ids=lambda value: value.replace(" ", "-")
)
def test_captured_steps_end_with_the_bits_of_eager_ones(name, case, monkeypatch):
    """Dropout, schedules, penalties every few steps, moving averages and reports included."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    engines = [engine_by(name, case, step) for step in ("eager", "captured")]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # so that both take the same kernels
    reports = [train(engine, range(STEPS)) for engine in engines]
    assert reports[0] == reports[1]
    held_equal(*engines)
    assert engines[0].captured is None and recorded(engines[1]) == len(engines[1].steps)
    means = [engine.read_report() for engine in engines]
    assert means[0][1] == means[1][1] and means[0][0] == pytest.approx(means[1][0])


def test_each_size_of_batch_has_a_recording_of_its_own():
    engines = [engine_by("fader", "by default", step) for step in ("eager", "captured")]
    for engine in engines:
        train(engine, range(2 * STEPS), lambda draw: 5 if draw % 2 else RECORDS)
    held_equal(*engines)
    assert recorded(engines[1]) == 2 * len(engines[1].method.stages()[0].phases)


def test_after_a_load_everything_is_recorded_anew():
    """The optimizers' moments lie elsewhere then."""
    engines = [engine_by("fader", "by default", step) for step in ("eager", "captured")]
    for engine in engines:
        train(engine, range(STEPS))
        engine.load(engine.state())
    assert recorded(engines[1]) == 0
    for engine in engines:
        train(engine, range(STEPS, 2 * STEPS))
    held_equal(*engines)
    assert recorded(engines[1]) == len(engines[1].steps)


def test_a_batch_that_is_not_finite_is_left_out_of_a_replay():
    engines = [engine_by("fader", "by default", step) for step in ("eager", "captured")]
    for engine in engines:
        train(engine, range(STEPS))
        for phase in engine.method.stages()[0].phases:
            one = batch(phase, STEPS)
            one.images[0] = torch.nan
            assert float(engine.update(phase, one, clock(STEPS))[f"{phase.name}/skipped"]) == 1.0
        train(engine, range(STEPS + 1, STEPS + 3))
    held_equal(*engines)


def clock(draw: int) -> Clock:
    return Clock(draw * RECORDS, draw * RECORDS, draw)


def test_a_batch_in_parts_is_recorded():
    engines = [engine_by("fader", "by default", step, settings=EngineConfig(accumulation=2)) for step in ("eager", "captured")]
    for engine in engines:
        train(engine, range(STEPS))
    held_equal(*engines)


@pytest.mark.parametrize("refused", ["latent_discriminator", "encoder+decoder"])
def test_a_phase_that_cannot_be_recorded_says_why_once_and_runs_as_it_is(refused, caplog):
    engines = [engine_by("fader", "by default", step, refused) for step in ("eager", "captured")]
    if engines[1].device.type == "cuda":
        pytest.skip("a stand-in refuses here, and CUDA's own graphs do not")
    for engine in engines:
        train(engine, range(STEPS))
    held_equal(*engines)
    assert recorded(engines[1]) == len(engines[1].steps) - 1
    (said,) = [record.message for record in caplog.records if "captured" in record.message]
    assert refused in said and "not permitted" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_loss_that_reads_the_device_runs_as_it_is_and_dropout_after_it_too(caplog):
    engine = Engine(build("judge", "sigmoid and dropout"))
    (phase,) = engine.method.stages()[0].phases

    def loss(networks, given, context):
        found = phase.loss(networks, given, context)
        return dataclasses.replace(found, value=found.value * (1.0 + 0.0 * float(found.value)))

    reading = dataclasses.replace(phase, loss=loss, name="reading")
    for draw in range(STEPS):
        assert engine.update(reading, batch(phase, draw), clock(draw))["reading/skipped"] == 0
    assert sum("cannot be captured" in record.message for record in caplog.records) == 1
    for draw in range(STEPS):
        engine.update(phase, batch(phase, draw), clock(draw))
    assert recorded(engine) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_cuda_reduced_precision_is_captured(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = [EngineConfig(step=step) for step in ("eager", "auto")]
    engines = [Engine(build("fader", "everything"), precision=precision, settings=one) for one in settings]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for engine in engines:
        train(engine, range(STEPS))
    held_equal(*engines)
    assert recorded(engines[1]) == len(engines[1].steps)


def test_without_cuda_captured_is_left_out_with_a_reason(caplog):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    engine = Engine(build("judge"), settings=EngineConfig(step="captured"))
    assert engine.captured is None
    assert [record.message for record in caplog.records if "no CUDA" in record.message]


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_end_with_the_weights_of_eager_ones():
    """The two ways differ by rounding, far less than a step moves the weights; and something really is compiled."""
    engines = [Engine(by_sgd("sham_sampler"), settings=EngineConfig(compile=how)) for how in ("none", "networks")]
    before = engines[0].state().networks
    torch._dynamo.utils.counters.clear()
    train(engines[0], range(2))
    assert not torch._dynamo.utils.counters["frames"]
    train(engines[1], range(2))
    assert torch._dynamo.utils.counters["frames"]["ok"] >= len(engines[1].networks)
    one, other = (engine.state().networks for engine in engines)
    moved = max(float((one[key] - before[key]).abs().max()) for key in one if before[key].is_floating_point())
    apart = max(float((one[key] - other[key]).abs().max()) for key in one)
    assert engines[1].compiled == set(engines[1].networks) and apart < 1e-4 * moved, (apart, moved)


def by_sgd(name: str):
    """Adam turns rounding into differences as large as a step."""
    method = build(name)
    groups = dict.fromkeys(method.optimizers(), SGD)
    method.optimizers = lambda: groups
    return method


TWICE = [("fader", "an image adversary", {"image_discriminator"})]
TWICE += [(name, case, {"generator", "discriminator"}) for name, case in CASES if case == "latent optimisation"]


@pytest.mark.parametrize(("name", "case", "twice"), TWICE)
def test_networks_that_are_differentiated_twice_are_not_compiled(name, case, twice, caplog):
    engine = Engine(build(name, case), settings=EngineConfig(compile="networks"))
    assert engine.compiled == set(engine.networks) - twice
    assert all(any(f"{one} (it is differentiated twice)" in record.message for record in caplog.records) for one in twice)
