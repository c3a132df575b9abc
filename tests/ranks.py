"""Runs small methods for a number of steps on however many ranks it is launched with, and writes what came of it.

    accelerate launch --config_file launch/accelerate/one_node.yaml -m tests.ranks OUT   every back end, fault and pair
    accelerate launch --config_file launch/accelerate/X.yaml -m tests.ranks OUT one      one case as the launcher says
    python -m tests.ranks OUT alone                                                      DeepSpeed without a launcher

OUT holds one process's states already: tests/pipeline/engine/test_ranks.py writes them before it launches this.
Parity is held in SGD, because Adam would turn rounding into differences as large as a fault's, and in float64 where the
back end takes it: DeepSpeed reduces in float32, so its cases run as they do in earnest, in float32.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fader.methods  # noqa: F401  fills METHODS
from fader.adversaries.latent import LatentSettings
from fader.adversaries.solved import SolvedSettings
from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.method import METHODS, Batch, Method
from pipeline.config import EngineConfig
from pipeline.engine import Engine, State
from pipeline.loading.plan import share
from pipeline.training.steps import Position, steps
from tests.shams import SHAMS, ShamSettings, registered

ATTRIBUTES = Attributes([Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "short", "long"))])
IMAGE_SIZE = 16
GLOBAL_BATCH = 8
UNEVEN_BATCH = 7
STEPS = 30
FEW_STEPS = 10  # where nothing depends on how many there are
CLIP_NORM = 0.1  # binds on these small methods, as 5 does on large ones
METHOD_NAMES = ("fader", "judge", *(sham.name for sham in SHAMS))
LATENT = {"latent_step": 0.5, "latent_damping": 1e-3}  # of latent optimisation; they move weights by 6e-3
KEYS = {"quantised_keys": 16, "quantised_weight": 0.2}  # of feature quantisation
SIBLINGS = ("cgan", "cvae", "icgan", "vacgan", "vaegan")
WITHOUT_BATCH_NORM = ("sham_sampler", "sham_penalised")
BACKENDS = {
    "ddp": EngineConfig(backend="ddp"),
    "zero0": EngineConfig(backend="deepspeed", zero_stage=0),
    "zero1": EngineConfig(backend="deepspeed", zero_stage=1),
    "zero2": EngineConfig(backend="deepspeed", zero_stage=2),
    "flat": EngineConfig(backend="ddp", step="captured"),  # on the CPU as it is, but for the capture
}
KINDS = ("single", "ddp", "zero1", "zero2")  # whose checkpoints must load each other's
SAVED_AT = (0, 1, 5, 9)  # steps; the sampler's second stage begins at step 7
GOES_ON = 3  # steps after a load, so that 5 crosses the stage boundary
POISONED = 2  # the draw that is not finite

Draw = Callable[[str, int], Batch]
Fault = Callable[[Engine], Draw | None]


@dataclass(frozen=True)
class Case:
    """One run. settings: the engine's. wide: float64. poisoned: one rank's batch of one draw is not finite.
    critic: there is a solved critic; heard: its pressure has a weight."""

    method: str
    settings: EngineConfig = EngineConfig()
    wide: bool = True
    batch_size: int = GLOBAL_BATCH
    fault: Fault | None = None
    precision: str = "fp32"
    steps: int = STEPS
    norm: str = "global"
    left_out: int | None = None
    poisoned: bool = False
    critic: bool = False
    heard: bool = True

    def with_(self, **changes: object) -> Case:
        engine = {k: changes.pop(k) for k in list(changes) if k in EngineConfig.model_fields}
        return dataclasses.replace(self, settings=self.settings.model_copy(update=engine), **changes)


def references() -> dict[str, Case]:
    """What one process runs, in float64 but for what is named otherwise."""
    cases = {name: Case(name) for name in METHOD_NAMES}
    cases |= {f"{name} uneven": Case(name, batch_size=UNEVEN_BATCH, steps=FEW_STEPS) for name in METHOD_NAMES}
    cases |= {f"{name} few": Case(name, steps=FEW_STEPS) for name in ("fader", *WITHOUT_BATCH_NORM, *SIBLINGS)}
    cases |= {f"{name} uneven": Case(name, batch_size=UNEVEN_BATCH, steps=FEW_STEPS) for name in SIBLINGS}
    cases["fader critic"] = Case("fader", batch_size=UNEVEN_BATCH, critic=True, steps=FEW_STEPS)
    cases["fader critic unheard"] = cases["fader critic"].with_(heard=False)
    cases["poisoned"] = Case("sham_quantised", steps=5, left_out=POISONED)
    cases |= {f"fader {precision}": Case("fader", wide=False, precision=precision, steps=5) for precision in ("fp32", "bf16")}
    return cases


def cases_of_ranks() -> dict[str, Case]:
    """What several ranks run: "back end/reference it must equal", and what is held against it otherwise."""
    from tests.faults_of_ranks import DEEPSPEED_FAULTS, FAULTS

    cases: dict[str, Case] = {}
    for backend, settings in BACKENDS.items():
        wide = backend in ("ddp", "flat")
        for name in METHOD_NAMES:
            cases[f"{backend}/{name}"] = Case(name, settings, wide)
        for name in WITHOUT_BATCH_NORM:
            cases[f"{backend}/{name} in parts"] = Case(name, settings, wide, steps=FEW_STEPS).with_(accumulation=2)
        cases[f"{backend}/poisoned"] = Case("sham_quantised", settings, wide, steps=5, poisoned=True)
        cases[f"{backend}/fader bf16"] = Case("fader", settings, False, precision="bf16", steps=5)
        compressed = Case("fader", settings, False, steps=FEW_STEPS).with_(gradient_compression="bf16")
        cases[f"{backend}/fader compressed"] = compressed
    for name in SIBLINGS:
        cases[f"zero1/{name} few"] = Case(name, BACKENDS["zero1"], False, steps=FEW_STEPS)
    for name in (*METHOD_NAMES, *SIBLINGS):
        cases[f"ddp/{name} uneven"] = Case(name, BACKENDS["ddp"], batch_size=UNEVEN_BATCH, steps=FEW_STEPS)
    cases["zero1/fader uneven"] = Case("fader", BACKENDS["zero1"], False, UNEVEN_BATCH, steps=FEW_STEPS)
    cases["ddp/fader critic"] = references()["fader critic"].with_(backend="ddp")
    cases["ddp/local norm"] = Case("fader", BACKENDS["ddp"], norm="local", steps=3)
    planted = (("fault", "ddp", True, FAULTS), ("deepspeed fault", "zero1", False, DEEPSPEED_FAULTS))
    for kind, backend, wide, faults in planted:
        for name, fault in faults.items():
            cases[f"{kind}/{name}"] = Case("fader", BACKENDS[backend], wide, fault=fault, steps=FEW_STEPS)
    return cases


def build(case: Case) -> Method:
    """A tiny method whose groups all learn by SGD."""
    kind = METHODS[case.method]
    images = (FEW_STEPS if case.steps == FEW_STEPS else STEPS) * case.batch_size
    small = {"images": images, "init_channels": 4, "max_channels": 8}
    settings = {
        "fader": lambda: kind.Settings(
            **small, num_layers=2, ema_half_life=64, norm=case.norm,
            latent=LatentSettings(
                weight=0.5, ramp_images=0 if case.critic else GLOBAL_BATCH * FEW_STEPS, hidden_channels=8, dropout=0.0
            ),
            solved=SolvedSettings(weight=(1.0 if case.heard else 1e-12) if case.critic else 0.0, half_life=50, steps=1),
            discriminator_others="train" if case.critic else "eval",
        ),
        "judge": lambda: kind.Settings(**small, hidden_channels=8),
        **{
            name: lambda: sibling(kind.Settings, {**small, **LATENT, **KEYS, "hidden_channels": 8, "dropout": 0.0})
            for name in SIBLINGS
        },
    }.get(case.method, lambda: ShamSettings(images))()  # fmt: skip
    torch.manual_seed(5)
    method = kind(settings, ATTRIBUTES, IMAGE_SIZE)
    groups = {
        trains: dataclasses.replace(optimizer, kind="sgd", learning_rate=0.05, clip_norm=CLIP_NORM)
        for trains, optimizer in method.optimizers().items()
    }
    method.optimizers = lambda: groups
    for network in method.networks.values():
        network.to(torch.float64 if case.wide else torch.float32)
    return method


def sibling(settings: type, sizes: dict[str, object]) -> object:
    """Settings with those of the sizes that they know."""
    return settings(**{name: size for name, size in sizes.items() if name in settings.__dataclass_fields__})


def one_share(case: Case, stream: str, draw: int, rank: int, world_size: int) -> Batch:
    """Images whose brightness follows the labels, one label unknown now and then: a rank's share of them."""
    dtype = torch.float64 if case.wide else torch.float32
    index = torch.arange(case.batch_size) + 1000 * draw
    draws = Draws.of(3, stream, draw, index)
    labels = torch.stack([draws.integers("a", 2), draws.integers("b", 4) - 1], 1).to(dtype)
    images = draws.normal("pixels", (3, IMAGE_SIZE, IMAGE_SIZE)).to(dtype) * 0.3
    images = images + (labels[:, 0] - 0.5)[:, None, None, None]
    known = (labels >= 0).sum(0).to(dtype) / world_size
    images, labels, index = (share(part, rank, world_size) for part in (images, labels, index))
    if case.poisoned and draw == POISONED and rank == world_size - 1:
        images = images * torch.nan
    size = torch.tensor(case.batch_size / world_size, dtype=dtype)
    return Batch(images, labels, index, Draws.of(3, stream, draw, index), size, known, case.batch_size)


def on(device: torch.device, batch: Batch) -> Batch:
    """A batch on the device that trains."""
    if device.type == "cpu":
        return batch
    moved = {name: getattr(batch, name).to(device) for name in ("images", "attributes", "index", "size", "known")}
    draws = dataclasses.replace(batch.draws, key=batch.draws.key.to(device), index=moved["index"])
    return dataclasses.replace(batch, **moved, draws=draws)


def train(
    engine: Engine, draw: Draw, position: Position, until: int, batch_size: int, skip: int | None = None
) -> Position:
    """Every step up to a number of steps; `skip` leaves one out."""
    for step in steps(engine.method.stages(), batch_size, position):
        if position.clock.updates >= until:
            break
        for turn in step.turns if step.clock.updates != skip else ():
            batch = on(engine.device, draw(turn.stream, turn.draw))
            if turn.phase.source == "labels":
                batch = dataclasses.replace(batch, images=None)
            engine.update(turn.phase, batch, step.clock)
        position = step.after
    return position


def run(case: Case) -> dict[str, torch.Tensor]:
    """Train one case to its end; the state as named tensors."""
    engine = Engine(build(case), precision=case.precision, seed=7, settings=case.settings)
    draw = (case.fault(engine) if case.fault else None) or (
        lambda stream, k: one_share(case, stream, k, engine.rank, engine.world_size)
    )
    stages = len(engine.method.stages())
    train(engine, draw, Position(), case.steps * stages, case.batch_size, case.left_out)
    return flat(engine.state())


def flat(state: State) -> dict[str, torch.Tensor]:
    parts = ("networks", "ema", "optimizers")
    return {f"{part}:{key}": value for part in parts for key, value in getattr(state, part).items()}


def unflat(tensors: dict[str, torch.Tensor]) -> State:
    parts: dict[str, dict[str, torch.Tensor]] = {"networks": {}, "ema": {}, "optimizers": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(":")
        parts[part][name] = value
    return State(**parts)


# --- who loads whose checkpoints --------------------------------------------------------------------------------------

STAGE = Case("sham_sampler", wide=False, batch_size=GLOBAL_BATCH)


def engine_of(kind: str, method_name: str = "sham_sampler") -> Engine:
    """Adam, in float32, as training has it; the sampler's stages are 7 steps long."""
    method = build(STAGE.with_(method=method_name))
    if method_name == "sham_sampler":
        method = METHODS[method_name](ShamSettings(7 * GLOBAL_BATCH), ATTRIBUTES, IMAGE_SIZE)
        torch.manual_seed(5)
        for parameter in (p for network in method.networks.values() for p in network.parameters()):
            parameter.data.normal_(0, 0.3)
    groups = {
        trains: dataclasses.replace(optimizer, kind="adam", learning_rate=0.01, weight_decay=0.01)
        for trains, optimizer in method.optimizers().items()
    }
    method.optimizers = lambda: groups
    return Engine(method, seed=7, settings=BACKENDS.get(kind, EngineConfig()))


def go_on(engine: Engine, position: Position, until: int) -> Position:
    case = STAGE.with_(method=engine.method.name)
    draw = lambda stream, k: one_share(case, stream, k, engine.rank, engine.world_size)  # noqa: E731
    return train(engine, draw, position, until, GLOBAL_BATCH)


def write_states(kind: str, folder: Path) -> None:
    """One unbroken run, its state at some steps and at GOES_ON steps after each; and Fader's after five steps."""
    engine, position = engine_of(kind), Position()
    for step in sorted({*SAVED_AT, *(k + GOES_ON for k in SAVED_AT)}):
        position = go_on(engine, position, step)
        _save(engine, folder / f"{kind}-{step}.safetensors")
    engine = engine_of(kind, "fader")
    go_on(engine, Position(), 5)
    _save(engine, folder / f"{kind}-fader.safetensors")


def _save(engine: Engine, path: Path) -> None:
    state = flat(engine.state())
    if engine.is_main:
        save_file(state, path)
    engine.wait()


def position_at(step: int) -> Position:
    """Where the sampler's run stands after so many steps."""
    position = Position()
    stages = METHODS["sham_sampler"](ShamSettings(7 * GLOBAL_BATCH), ATTRIBUTES, IMAGE_SIZE).stages()
    for done in steps(stages, GLOBAL_BATCH, position):
        if position.clock.updates >= step:
            break
        position = done.after
    return position


def load_states(kind: str, others: tuple[str, ...], folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Load others' states into a run that has gone elsewhere: what it holds then, and GOES_ON steps later."""
    engine = engine_of(kind)
    go_on(engine, Position(), 2)
    for other in others:
        for step in SAVED_AT:
            engine.load(unflat(load_file(folder / f"{other}-{step}.safetensors")))
            _hold_moments_in_another_order(engine)
            yield f"{other} to {kind} at {step}", flat(engine.state())
            go_on(engine, position_at(step), step + GOES_ON)
            yield f"{other} to {kind} past {step}", flat(engine.state())
    engine = engine_of(kind, "fader")
    go_on(engine, Position(), 2)
    for other in others:
        engine.load(unflat(load_file(folder / f"{other}-fader.safetensors")))
        yield f"{other} to {kind} fader", flat(engine.state())


def _hold_moments_in_another_order(engine: Engine) -> None:
    """One rank's optimizers name their moments in reverse, which must not matter to what all ranks gather."""
    for group in engine.groups.values() if engine.rank % 2 else ():
        for held, moments in list(group.optimizer.state.items()):
            group.optimizer.state[held] = dict(reversed(list(moments.items())))


# --- the launches -----------------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All that two ranks are tried with. `folder` holds one process's states already."""
    tensors = {}
    for name, case in cases_of_ranks().items():
        tensors |= {f"{name}|{key}": value for key, value in run(case).items()}
    for kind in KINDS[1:]:
        write_states(kind, folder)
    for kind in KINDS[1:]:
        for name, state in load_states(kind, KINDS, folder):
            tensors |= {f"{name}|{key}": value for key, value in state.items()}
    return tensors | {"autocast": torch.tensor(autocast_inside_deepspeed())}


def autocast_inside_deepspeed() -> bool:
    """Whether a loss under DeepSpeed with precision bf16 runs in autocast to bfloat16."""
    case = Case("sham_penalised", BACKENDS["zero1"], wide=False, precision="bf16")
    method = build(case)
    seen, loss = [], method.critic_loss

    def watched(networks, batch, context):
        seen.append(torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16)
        return loss(networks, batch, context)

    method.critic_loss = watched
    engine = Engine(method, precision="bf16", settings=case.settings)
    draw = lambda stream, k: one_share(case, stream, k, engine.rank, engine.world_size)  # noqa: E731
    train(engine, draw, Position(), 2, GLOBAL_BATCH)
    return all(seen) and len(seen) == 2


def launched() -> dict[str, torch.Tensor]:
    """One case on whatever back end the launcher chose, which the tensors name; after DDP, DeepSpeed by the experiment."""
    case = Case("fader", wide=False, steps=5)
    engine = Engine(build(case), settings=case.settings)
    tensors = {f"{engine.backend}/fader|{key}": value for key, value in run(case).items()}
    stage = max((getattr(group, "stage", -1) for group in engine.groups.values()), default=-1)
    if engine.backend == "ddp":
        tensors |= chosen_by_the_experiment("zero1")
    return tensors | {"stage": torch.tensor(stage)}


def chosen_by_the_experiment(*names: str) -> dict[str, torch.Tensor]:
    """The same case on back ends that the experiment names."""
    cases = {name: Case("fader", BACKENDS[name], wide=False, steps=5) for name in names}
    return {f"{name}/fader|{key}": value for name, case in cases.items() for key, value in run(case).items()}


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with registered():
        ways = {"one": launched, "alone": lambda: chosen_by_the_experiment("zero0", "zero1", "zero2")}
        tensors = ways[sys.argv[2]]() if len(sys.argv) > 2 else everything(out)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    save_file({**tensors, "world_size": torch.tensor(world_size)}, out / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
