"""Runs small methods for a number of steps on however many ranks it is launched with, and writes what came of it.

    python -m tests.ranks OUT                                                        one process
    accelerate launch --config_file launch/accelerate/cpu.yaml -m tests.ranks OUT    two, and every planted fault

Everything is float64 and SGD: Adam would turn rounding into differences as large as a fault's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.method import METHODS, Batch, Method
from pipeline.batches import share
from pipeline.engine import Engine
from pipeline.steps import Position, steps
from tests.shams import SHAMS, ShamSettings, registered

ATTRIBUTES = Attributes([Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "short", "long"))])
IMAGE_SIZE = 16
GLOBAL_BATCH = 8
STEPS = 30
CLIP_NORM = 0.1  # binds on these small methods, as 5 does on large ones
METHOD_NAMES = ("fader", "judge", *(sham.name for sham in SHAMS))


def build(name: str) -> Method:
    """A tiny method whose groups all learn by SGD."""
    kind = METHODS[name]
    small = {"images": STEPS * GLOBAL_BATCH, "init_channels": 4, "max_channels": 8}
    settings = {
        "fader": lambda: kind.Settings(
            **small, num_layers=2, hidden_channels=8, lambda_max=0.5, ramp_images=100, latent_dropout=0.0, ema_half_life=64
        ),
        "judge": lambda: kind.Settings(**small, hidden_channels=8),
    }.get(name, lambda: ShamSettings(STEPS * GLOBAL_BATCH))()
    torch.manual_seed(5)
    method = kind(settings, ATTRIBUTES, IMAGE_SIZE)
    groups = {
        trains: dataclasses.replace(optimizer, kind="sgd", learning_rate=0.05, clip_norm=CLIP_NORM)
        for trains, optimizer in method.optimizers().items()
    }
    method.optimizers = lambda: groups
    for network in method.networks.values():
        network.double()
    return method


def global_batch(stream: str, draw: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images whose brightness follows the labels, the labels (one of them unknown now and then), the record numbers."""
    index = torch.arange(GLOBAL_BATCH) + 1000 * draw
    draws = Draws(3, stream, draw, index)
    labels = torch.stack([draws.integers("a", 2), draws.integers("b", 4) - 1], 1).double()
    images = draws.normal("pixels", (3, IMAGE_SIZE, IMAGE_SIZE)).double() * 0.3
    return images + (labels[:, 0] - 0.5)[:, None, None, None], labels, index


def one_share(stream: str, draw: int, rank: int, world_size: int) -> Batch:
    images, labels, index = global_batch(stream, draw)
    known = (labels >= 0).sum(0).double() / world_size
    images, labels, index = (share(part, rank, world_size) for part in (images, labels, index))
    return Batch(images, labels, index, Draws(3, stream, draw, index), GLOBAL_BATCH / world_size, known)


def run(name: str, fault: Callable[[Engine], Callable[[str, int], Batch] | None] | None = None) -> dict[str, torch.Tensor]:
    """Train one method for its steps; the state as named tensors."""
    method = build(name)
    engine = Engine(method, seed=7)
    draw = lambda stream, k: one_share(stream, k, engine.rank, engine.world_size)  # noqa: E731
    draw = (fault(engine) if fault else None) or draw
    for step in steps(method.stages(), GLOBAL_BATCH, Position()):
        for turn in step.turns:
            batch = draw(turn.stream, turn.draw)
            if turn.phase.source == "labels":
                batch = dataclasses.replace(batch, images=None)
            engine.update(turn.phase, batch, step.clock)
    state = engine.state()
    return {f"{name}:{key}": value for part in (state.networks, state.ema) for key, value in part.items()} | {
        f"{name}:ema:{key}": value for key, value in state.ema.items()
    }


def main() -> None:
    from tests.faults_of_ranks import FAULTS

    out = Path(sys.argv[1])
    tensors: dict[str, torch.Tensor] = {}
    with registered():
        for name in METHOD_NAMES:
            tensors |= run(name)
    rank, world_size = _place()
    for name, fault in FAULTS.items() if world_size > 1 else ():
        tensors |= {key.replace("fader", name, 1): value for key, value in run("fader", fault).items()}
    tensors["world_size"] = torch.tensor(world_size)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / f"rank{rank}.safetensors")


def _place() -> tuple[int, int]:
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


if __name__ == "__main__":
    main()
