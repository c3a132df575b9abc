"""A set three of whose training pictures were destroyed after it was prepared, and a run over it that tells its ranks.

`python -m tests.damaged SET OUT` trains without a break, and broken off and resumed; each rank writes what it held.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import config
from pipeline.data.datasets.record import Dataset
from pipeline.data.shards import ShardSet, prepare
from pipeline.engine import Engine
from pipeline.training import assembly
from pipeline.training.run import train

SIZES = {"train": 40, "valid": 8}
BAD = (11, 12, 30)  # rows of train; the second stands right behind the first


def grey(number: int) -> int:
    return 20 + number * 4


def read(location: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), (grey(int(location)),) * 3).save(out, "JPEG", quality=95)
    return out.getvalue()


def labels(number: int) -> list[float]:
    """Odd is always known, Third often not."""
    return [number % 2, (-1, 0, 1, 1)[number % 4]]


def damaged_set(folder: Path) -> ShardSet:
    """Pictures whose grey is their number; those of BAD rows hold zeros for the most part."""
    count = sum(SIZES.values())
    splits = [name for name, size in SIZES.items() for _ in range(size)]
    names = [f"{number:04d}" for number in range(count)]
    index = Dataset(
        name="grey",
        source={},
        attribute_list=[{"name": name, "kind": "binary", "categories": []} for name in ("Odd", "Third")],
        keys=names,
        splits=splits,
        locations=[str(number) for number in range(count)],
        labels=np.array([labels(number) for number in range(count)], np.float32),
        places=names,
        read=read,
    )
    shards = prepare(index, folder, shard_records=16, workers=1)
    split = shards.split("train")
    for row in BAD:
        with open(split.shards[split.shard[row]], "r+b") as tar:
            tar.seek(int(split.offset[row]))
            tar.write(bytes(int(split.size[row]) * 2 // 3))
    return ShardSet.open(folder)


def experiment(path: Path, images: int) -> config.Experiment:
    method = {"name": "judge", "preset": "small", "init_channels": 4, "max_channels": 8, "hidden_channels": 8}
    tree = {
        "name": "damaged",
        "method": {**method, "images": images},
        "data": {
            "path": str(path),
            "attributes": ["*"],
            "image_size": 32,
            "crop": "center",
            "cache": "none",
            "quarantine_share": 0.1,
        },
        "batch_size": 10,
        "run": {"log_images": 80, "checkpoint_images": 80, "picture_images": 0},
        "tracking": {"enabled": False},
    }
    return config.build(tree, "test")


class Watched(Engine):
    """Remembers what each update read; the last one made is `now`."""

    now: Watched

    def __init__(self, *given, **options) -> None:
        super().__init__(*given, **options)
        self.known: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []
        Watched.now = self

    def update(self, phase, batch, clock):
        self.known.append(batch.known * self.world_size)
        self.index.append(batch.index)
        return super().update(phase, batch, clock)


def main() -> None:
    path, out = map(Path, sys.argv[1:])
    assembly.Engine = Watched
    for name, parts in {"unbroken": [320], "resumed": [160, 320]}.items():
        for images in parts:
            train(experiment(path, images), out / name, resume=images != parts[0])
        engine = Watched.now
        weights = {f"w:{n}/{k}": v.clone() for n, w in engine.method.networks.items() for k, v in w.state_dict().items()}
        seen = {"known": torch.stack(engine.known), "index": torch.stack(engine.index)}
        save_file({**weights, **seen}, out / f"{name}-rank{engine.rank}of{engine.world_size}.safetensors")


if __name__ == "__main__":
    main()
