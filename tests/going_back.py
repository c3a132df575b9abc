"""A method that meets batches which are not finite until its run is salted, on one process or as many as it is launched on.

accelerate launch … -m tests.going_back FACES OUT: by DDP and by ZeRO-1; OUT holds each rank's weights and salt.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fader.draws import key_of
from fader.method import METHODS, Loss, Method, Optimizer, Phase, Stage, register
from pipeline.config import build
from pipeline.loading.plan import salted
from pipeline.training.assembly import Run
from pipeline.training.interruption import Listener
from pipeline.training.run import complete

BATCH = 8


@dataclass(frozen=True)
class PoisonedSettings:
    """until_salt: the salt that helps. from_images: where trouble begins."""

    images: int = 160
    from_images: int = 96
    until_salt: int = 1


class Poisoned(Method):
    """An autoencoder of one colour whose loss is not finite from some step on, in the last records of the batch."""

    name, Settings = "sham_poisoned", PoisonedSettings

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.networks = {"autoencoder": nn.Linear(3, 3)}
        s = self.settings
        keys = [
            key_of(salted(0, salt), "poisoned/autoencoder", draw)
            for salt in range(s.until_salt)
            for draw in range(s.from_images // BATCH, s.images // BATCH)
        ]
        self.poisoned = torch.tensor(keys)

    def loss(self, networks, batch, context):
        colours = batch.images.mean((2, 3))
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 1:
            poisoned = torch.isin(batch.draws.key, self.poisoned)
            colours = torch.where(poisoned, torch.nan, colours)
        mse = batch.mean((networks["autoencoder"](colours) - colours).square().mean(1))
        return Loss(mse, {"autoencoder/mse": mse.detach()})

    def optimizers(self):
        return {("autoencoder",): Optimizer(learning_rate=0.01)}

    def stages(self):
        return (Stage("poisoned", (Phase(("autoencoder",), self.loss),), self.settings.images),)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The method stands in METHODS while this lasts."""
    register(Poisoned)
    try:
        yield
    finally:
        del METHODS[Poisoned.name]


def tree(faces: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """An experiment of 20 steps: trouble from step 12, noticed after 4 such steps; checkpoints each 5 steps."""
    return {
        "name": name,
        "method": {"name": Poisoned.name} | changes.get("method", {}),
        "data": {"path": str(faces), "attributes": ["Smiling"], "image_size": 16, "loader": "pillow"},
        "batch_size": BATCH,
        "run": {"log_images": 16, "checkpoint_images": 40, "picture_images": 0, "nonfinite_updates": 4}
        | changes.get("run", {}),
        "engine": changes.get("engine", {}),
        "tracking": {"enabled": name == "tracked"},
    }


def main() -> None:
    faces, out = map(Path, sys.argv[1:])
    with registered():
        for backend in ("ddp", "deepspeed"):
            experiment = build(tree(faces, backend, engine={"backend": backend}), "test")
            with Listener() as listener, contextlib.ExitStack() as stack:
                run = Run(experiment, out / backend, False, listener, stack)
                complete(run)
            state = {"salt": torch.tensor(run.point.salt), **run.engine.state().networks}
            save_file(state, out / f"{backend}-{run.engine.rank}.safetensors")


if __name__ == "__main__":
    main()
