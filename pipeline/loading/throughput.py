"""How fast data comes: our loaders beside what others offer, and beside DALI alone, which is the limit.

Each of them gives the next ready batch of flipped floats in [-1, 1]; only DALI alone stops at uint8 squares. They take
turns, round after round, because what else the machine does should meet all of them. A rate is the median of its rounds,
and a ratio the median of the rounds' ratios. The first batches of a turn are not counted, because some of them were made
before the clock started.
"""

import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fader.attributes import Attributes
from fader.method import Batch
from pipeline.data.datasets import DATASETS
from pipeline.data.shards import Split, prepare
from pipeline.images import Preprocessing, flip, preprocess, to_float
from pipeline.loading.cache import Cache
from pipeline.loading.dali import dali_alone, open_loader
from pipeline.loading.pillow import stock_stream
from pipeline.loading.plan import Plan, Request

Maker = Callable[[], Iterator[Any]]
Rates = dict[str, list[float]]

_PREFETCH = 3  # batches that DALI alone, and each worker process, makes ahead


@dataclass(frozen=True)
class Measure:
    """How to measure: threads of DALI, and worker processes of a DataLoader; rounds, turns that everyone has, of so many
    seconds at least; device, where batches end."""

    batch_size: int = 64
    threads: int = 2
    rounds: int = 5
    seconds: float = 2.0
    device: torch.device = torch.device("cpu")


def median_ratio(rates: Rates, of: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[of], rates[to], strict=True))


def loading_rates(
    split: Split, preprocessing: Preprocessing, folder: Path, measure: Measure, progress: Callable[[str], None]
) -> Rates:
    """Images a second of each way to load the split, round by round. folder: an empty one for index files and pictures.

    Returns "bare": DALI alone; "floats": the same to flipped floats, which all that follow give; "streamed", "cached":
    ours; "webdataset": its stock stream, and "files": a DataLoader over picture files, both with Pillow.
    """
    stock = {"batch_size": measure.batch_size, "drop_last": True, "prefetch_factor": _PREFETCH}
    webdataset = DataLoader(
        stock_stream(split, Attributes([]), preprocessing), num_workers=min(measure.threads, len(split.shards)),
        collate_fn=_stock_floats, **stock,
    )
    files = DataLoader(
        write_files(split, folder / "files"), num_workers=measure.threads,
        collate_fn=partial(_file_floats, preprocessing), shuffle=True, **stock,
    )
    options = {"batch_size": measure.batch_size, "threads": measure.threads, "device": measure.device}
    alone = partial(dali_alone, split, preprocessing, folder, **options, prefetch=_PREFETCH)
    makers: dict[str, Maker] = {
        "bare": alone,
        "floats": partial(alone, floats=True),
        "streamed": _ours(split, preprocessing, measure, "none"),
        "cached": _ours(split, preprocessing, measure, "device"),
        "webdataset": partial(_over_and_over, webdataset, measure.device),
        "files": partial(_over_and_over, files, measure.device),
    }
    rates: Rates = {name: [] for name in makers}
    for turn in range(measure.rounds):
        for name, maker in makers.items():
            progress(f"{preprocessing.image_size} pixels: {name}")
            ahead = 2 * _PREFETCH * measure.threads
            if name == "cached" and not turn:
                ahead = -(-len(split) // measure.batch_size) + 1  # it fills
            rates[name].append(_rate(maker(), measure, ahead))
    return rates


def _rate(batches: Iterator[Any], measure: Measure, ahead: int) -> float:
    """Images a second of an endless iterator, which is ended after."""
    for _ in range(ahead):
        next(batches)
    _settle(measure.device)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < measure.seconds or count < 4:
        next(batches)
        count += 1
        if not count % 20:
            _settle(measure.device)
    _settle(measure.device)
    seconds = time.monotonic() - began
    batches.close()
    return count * measure.batch_size / seconds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ours(split: Split, preprocessing: Preprocessing, measure: Measure, cache: Cache) -> Maker:
    loader = open_loader(
        "dali", cache, split, split.attributes, preprocessing, seed=0, device=measure.device, threads=measure.threads
    )
    plan = Plan(len(split), seed=0)

    def make() -> Iterator[Batch]:
        rows = (plan.rows("bench", draw, measure.batch_size) for draw in itertools.count())
        yield from loader.batches(Request("bench", draw, part, flip=True) for draw, part in enumerate(rows))

    return make


def _over_and_over(batches: DataLoader, device: torch.device) -> Iterator[Tensor]:
    while True:
        for images in batches:
            yield images.to(device)


def _flipped_floats(pictures: list[np.ndarray]) -> Tensor:
    """[N, C, S, S] in [-1, 1] of uint8 pictures [S, S, C], half of them mirrored, by chance that repeats nothing."""
    images = to_float(torch.from_numpy(np.stack(pictures)))
    return flip(images, torch.rand(len(images)) < 0.5)


def _stock_floats(samples: list[tuple]) -> Tensor:
    return _flipped_floats([picture for _, picture, _ in samples])


def _file_floats(preprocessing: Preprocessing, paths: list[Path]) -> Tensor:
    return _flipped_floats([preprocess(Image.open(path).convert("RGB"), preprocessing) for path in paths])


def write_files(split: Split, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{row:07d}.jpg" for row in range(len(split))]
    for row, path in enumerate(paths):
        if not path.exists():
            path.write_bytes(split.bytes(row).tobytes())
    return paths


def prepare_seconds(paths: list[Path], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds that `fader prepare` and `tar cf` take for the same picture files, round by round, in turns; files are in
    memory. "prepare" decodes every picture, "prepare header" does not; both digest and sync, which tar does not."""
    table = folder / "list.csv"
    table.write_text("\n".join(["path,odd", *(f"{path},{number % 2}" for number, path in enumerate(paths))]))
    seconds: dict[str, list[float]] = {"prepare": [], "prepare header": [], "tar": []}
    for turn in range(rounds):
        for name, check in (("prepare", "full"), ("prepare header", "header")):
            began = time.monotonic()
            prepare(DATASETS["table"](table, attributes=("odd",)), folder / f"set {name} {turn}", check=check)
            seconds[name].append(time.monotonic() - began)
        began = time.monotonic()
        tar = ["tar", "cf", str(folder / f"plain{turn}.tar"), "-C", str(paths[0].parent), "."]
        subprocess.run(tar, check=True)
        seconds["tar"].append(time.monotonic() - began)
    return seconds


def machine() -> dict[str, Any]:
    packages = ("torch", "nvidia-dali-cuda130", "webdataset", "pillow", "numpy")
    memory = _field("/proc/meminfo", "MemTotal")
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory.split()[0]) * 1024 if memory else 0,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "load": os.getloadavg()[0],
    }


def _field(path: str, name: str) -> str | None:
    """The value behind `name:` in a file of the kernel; None where there is no such file or line."""
    lines = Path(path).read_text().splitlines() if os.path.exists(path) else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
