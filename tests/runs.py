"""Runs without training, an MLflow store without its slow first start, and a method whose pictures show its code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from pipeline import config
from pipeline.engine import State
from pipeline.models import checkpoint

ATTRIBUTES = Attributes(
    [Attribute("Smiling"), Attribute("Eyeglasses"), Attribute("Beard", "k-way", ("none", "moustache", "full"))]
)
FADER = {
    "name": "fader",
    "preset": "small",
    "init_channels": 4,
    "max_channels": 8,
    "num_layers": 3,
    "latent": {"hidden_channels": 8},
}
JUDGE = {"name": "judge", "preset": "small", "init_channels": 4, "max_channels": 8, "hidden_channels": 8}


def make_run(folder: Path, method: dict[str, Any], *, images: int = 3200, seed: int = 0, **tree: Any) -> Path:
    """A run's folder as training leaves it, with random weights. tree: keys of the experiment; data's are merged.

    attributes: of its shard set.
    """
    own_seed = 7001 if method["name"] == "judge" else seed  # no run starts as its judge did
    torch.manual_seed(own_seed)
    attributes = tree.pop("attributes", ATTRIBUTES)
    data = {"path": "nowhere", "attributes": ["*"], "image_size": 32} | tree.pop("data", {})
    experiment = config.build({"name": folder.name, "seed": own_seed, "method": method, "data": data, **tree}, "test")
    built = config.build_method(experiment, attributes)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(experiment.dump())
    about = {"attributes": built.attributes.to_list(), "data_digest": "d" * 64, "commit": "c0ffee"}
    (folder / "run.json").write_text(json.dumps(about))
    networks = {
        f"{name}/{key}": tensor.clone().contiguous()
        for name, network in built.networks.items()
        for key, tensor in network.state_dict().items()
    }
    checkpoint.write(folder, images, State(networks, {}, {}), {})
    return folder


@functools.cache
def _database() -> Path:
    """An MLflow database with its tables made, which takes MLflow some five seconds: made once, copied often."""
    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    line = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{path}"]
    subprocess.run(line, check=True, capture_output=True, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    return path


def make_store(folder: Path) -> str:
    """The address of a fresh MLflow store in `folder`."""
    shutil.copy(_database(), folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def photo(path: Path, size: tuple[int, int] = (178, 218), colour: tuple[int, int, int] = (128, 128, 128)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@dataclass(frozen=True)
class PainterSettings:
    images: int = 100
    head: str = "softmax"


class Painter(Method):
    """Planted truth: red, green, blue are the code's weights of Smiling, Eyeglasses, a full Beard; 0 to 1 as -1 to 1.

    It judges by reading the same colours back.
    """

    name, Settings = "sham_painter", PainterSettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.networks = {"brush": torch.nn.Linear(1, 1)}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("paint", (Phase(("brush",), self.loss),), self.settings.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {("brush",): Optimizer()}

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        return Loss(networks["brush"].weight.sum())

    def encode(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latent: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        colours = code[:, [1, 3, 6]] * 2 - 1
        return colours[:, :, None, None].expand(-1, -1, *latent.shape[2:])

    def judge(self, images: torch.Tensor) -> torch.Tensor:
        red, green, blue = (images.mean((2, 3)) * 5).unbind(1)
        return torch.stack([-red, red, -green, green, -blue, torch.full_like(blue, -99), blue], 1)


class OtherPainter(Painter):
    """The painter as a judge of another build, which reads alike."""

    name = "sham_other_painter"


@contextlib.contextmanager
def painter() -> Iterator[dict[str, str]]:
    """The painters among METHODS; gives the `method:` settings of the first."""
    register(Painter)
    register(OtherPainter)
    try:
        yield {"name": "sham_painter"}
    finally:
        del METHODS["sham_painter"], METHODS["sham_other_painter"]
