"""The first losses of every method and every config, made small: a change that should not alter results keeps them.

    python -m tests.golden        writes tests/golden.json anew, for a change that should
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attributes
from fader.draws import Draws
from fader.method import METHODS, Batch, Method
from pipeline import config
from pipeline.engine import Engine
from pipeline.training.steps import Position, steps
from tests.test_configs import AVAILABLE, CELEBA, CONFIGS

FILE = Path(__file__).with_suffix(".json")
STEPS = 20
BATCH = 8
IMAGE_SIZE = 32
SMALL = {
    "init_channels": 4,
    "max_channels": 16,
    "num_layers": 3,
    "hidden_channels": 16,
    "images": STEPS * BATCH,
    "ramp_images": STEPS * BATCH // 2,
    "warmup_images": 0,
}


def small(settings: object) -> object:
    """A method's settings with small networks, a short ramp and a short life; all else as it is."""
    changes = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in changes.items():
        if dataclasses.is_dataclass(value):
            changes[name] = small(value)
        elif name in SMALL and not (name == "hidden_channels" and getattr(settings, "is_residual", False)):
            changes[name] = SMALL[name]
    return type(settings)(**changes)


def families() -> dict[str, Callable[[], Method]]:
    """Every registered method with its defaults, and every config."""
    found: dict[str, Callable[[], Method]] = {}
    two = AVAILABLE.select(CELEBA[:2])
    for name, kind in METHODS.items():
        if kind.__module__.startswith("fader."):
            found[f"method {name}"] = lambda kind=kind: kind(small(kind.Settings()), two, IMAGE_SIZE)
    for path in CONFIGS:
        experiment = config.load(path)
        data = experiment.data.model_copy(update={"image_size": IMAGE_SIZE})
        tiny = experiment.model_copy(update={"method": small(experiment.method), "data": data})
        found[f"config {path.stem}"] = lambda tiny=tiny: config.build_method(tiny, AVAILABLE)
    return found


def batch(attributes: Attributes, stream: str, draw: int) -> Batch:
    """Records of noise whose brightness follows the first label."""
    index = torch.arange(BATCH) + 1000 * draw
    draws = Draws.of(3, stream, draw, index)
    labels = torch.stack([draws.integers(a.name, a.k) for a in attributes], 1).float()
    labels = labels.double()
    images = draws.normal("pixels", (3, IMAGE_SIZE, IMAGE_SIZE)) * 0.3 + (labels[:, 0] - 0.5)[:, None, None, None]
    known = torch.full((len(attributes),), float(BATCH), dtype=torch.float64)
    size = torch.tensor(BATCH, dtype=torch.float64)
    return Batch(images.double(), labels, index, draws, size, known, BATCH)


def losses(build: Callable[[], Method]) -> dict[str, list[float]]:
    """What the phases report in the first steps of each stage, but for accuracies.

    In float64: in float32 the number of threads alone moves gradient norms by a percent within ten Adam steps.
    """
    torch.manual_seed(11)
    method = build()
    for network in method.networks.values():
        network.double()
    engine = Engine(method, seed=7)
    found: dict[str, list[float]] = {}
    for step in steps(method.stages(), BATCH, Position()):
        for turn in step.turns:
            one = batch(method.attributes, turn.stream, turn.draw)
            if turn.phase.source == "labels":
                one = dataclasses.replace(one, images=None)
            for name, value in engine.update(turn.phase, one, step.clock).items():
                if "accuracy" not in name:
                    found.setdefault(name, []).append(float(value))
    return found


def main() -> None:
    golden = {name: losses(build) for name, build in families().items()}
    families_of_lines = []
    for family, found in golden.items():
        lines = [f'  "{name}": [{", ".join(f"{v:.7g}" for v in values)}]' for name, values in found.items()]
        families_of_lines.append(f' "{family}": {{\n' + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(families_of_lines) + "\n}\n")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
