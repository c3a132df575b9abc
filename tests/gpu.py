"""`make gpu`: every check and benchmark that needs CUDA, in one go; one JSON and one Markdown table.

    python -m tests.gpu [--out FOLDER]

A cell is a function that returns a dict of results, run in a process of its own with a time limit, so that a crash of
one costs only its row. With no GPU it says so and exits 0; with one it exits 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CELLS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {}


def cell(seconds: int) -> Callable:
    """Registers a cell with its time limit."""

    def add(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        CELLS[function.__name__] = (function, seconds)
        return function

    return add


@cell(150)
def marked_tests() -> dict[str, Any]:
    """Every test marked `gpu`."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    tail = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    if done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-1000:])
    return {"pytest": tail[0] if tail else ""}


def _training_rate(preset: str, image_size: int, batch_size: int, precision: str, seconds: float = 8.0) -> dict[str, Any]:
    import fader.methods  # noqa: F401  fills METHODS
    from fader.attributes import Attribute, Attributes
    from fader.method import METHODS, Batch, Clock
    from pipeline.engine import Engine

    kind = METHODS["fader"]
    torch.manual_seed(0)
    method = kind(kind.Settings(preset=preset, ramp_images=0, lambda_max=1e-3), Attributes([Attribute("Smiling")]), image_size)
    engine = Engine(method, precision=precision)
    images = torch.rand(batch_size, 3, image_size, image_size, device=engine.device) * 2 - 1
    labels = torch.randint(0, 2, (batch_size, 1), device=engine.device).float()
    phases = method.stages()[0].phases
    steps, began, first = 0, 0.0, {}
    while steps < 5 or time.monotonic() - began < seconds:
        if steps == 5:
            torch.cuda.synchronize()
            began = time.monotonic()
        for phase in phases:
            report = engine.update(phase, Batch.alone(images, labels, stream=phase.stream, draw=steps), Clock())
        if steps % 20 == 0:
            torch.cuda.synchronize()
        first = first or {name: float(value) for name, value in report.items()}
        steps += 1
    torch.cuda.synchronize()
    rate = (steps - 5) * batch_size / (time.monotonic() - began)
    last = {name: float(value) for name, value in report.items()}
    assert last["autoencoder/mse"] < first["autoencoder/mse"], "it did not learn one batch"
    assert last["encoder+decoder/skipped"] == 0
    memory = torch.cuda.max_memory_allocated() / 2**30
    return {"images/s": round(rate), "peak GiB": round(memory, 2), "mse": [first["autoencoder/mse"], last["autoencoder/mse"]]}


@cell(60)
def train_small_64_bf16() -> dict[str, Any]:
    return _training_rate("small", 64, 256, "bf16")


@cell(60)
def train_small_64_batch_32_bf16() -> dict[str, Any]:
    return _training_rate("small", 64, 32, "bf16")


@cell(60)
def train_official_256_bf16() -> dict[str, Any]:
    return _training_rate("official", 256, 64, "bf16")


@cell(60)
def train_official_256_fp32() -> dict[str, Any]:
    return _training_rate("official", 256, 64, "fp32")


@cell(120)
def loader_mixed_decode_128() -> dict[str, Any]:
    """Drawn faces decoded on the GPU: streamed and kept batches a second, and that they agree to the bit."""
    from pipeline.batches import Plan, Request
    from pipeline.dali_loader import open_loader
    from pipeline.images import Preprocessing
    from pipeline.shards import ShardSet

    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "launch.prepare", "faces", f"{folder}/set", "--count", "4000"]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        shards = ShardSet.open(f"{folder}/set")
        split = shards.split("train")
        plan = Plan(len(split), seed=0)
        rates: dict[str, Any] = {}
        firsts = []
        for cache in (False, True):
            loader = open_loader(
                "dali", cache, split, shards.attributes, Preprocessing(128), seed=0, device=torch.device("cuda:0"), threads=8
            )
            batches = loader.batches(Request("x", k, plan.rows("x", k, 256), flip=True) for k in range(10**6))
            firsts.append(next(batches).images.clone())
            for _ in range(5):
                next(batches)
            torch.cuda.synchronize()
            began, count = time.monotonic(), 0
            while time.monotonic() - began < 8:
                next(batches)
                count += 256
                if count % 5120 == 0:
                    torch.cuda.synchronize()
            torch.cuda.synchronize()
            rates["kept images/s" if cache else "streamed images/s"] = round(count / (time.monotonic() - began))
            batches.close()
        assert torch.equal(*firsts), "streamed and kept batches differ"
        return rates


def _in_process(name: str, queue: Any) -> None:
    try:
        queue.put((True, CELLS[name][0]()))
    except BaseException:  # a cell's failure is its result; the row shows it
        queue.put((False, {"error": traceback.format_exc()[-3000:]}))


def run_cell(name: str) -> dict[str, Any]:
    """One row: name, passed, seconds and what the cell returned."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_process, args=(name, queue))
    began = time.monotonic()
    process.start()
    try:
        passed, result = queue.get(timeout=CELLS[name][1])
    except Exception:
        passed, result = False, {"error": f"no result in {CELLS[name][1]} s, exit code {process.exitcode}"}
    process.join(5)
    if process.is_alive():
        process.kill()
    return {"cell": name, "passed": passed, "seconds": round(time.monotonic() - began, 1), **result}


def hardware() -> dict[str, str]:
    import accelerate
    import nvidia.dali

    return {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "dali": nvidia.dali.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def markdown(about: dict[str, str], rows: list[dict[str, Any]]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", "| cell | passed | seconds | result |", "|---|---|---|---|"]
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ("cell", "passed", "seconds")}
        text = ", ".join(f"{key} {value}" for key, value in rest.items()).replace("\n", " ").replace("|", "/")
        lines.append(f"| {row['cell']} | {'yes' if row['passed'] else 'NO'} | {row['seconds']} | {text[:400]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", nargs="*", help="names of cells")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA device, so the {len(CELLS)} cells of `make gpu` were not run")
        return
    rows = []
    for name in options.only or CELLS:
        rows.append(run_cell(name))
        print(json.dumps(rows[-1]), flush=True)
    about = hardware()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps({"hardware": about, "cells": rows}, indent=1))
    (options.out / "gpu.md").write_text(markdown(about, rows))
    print(f"wrote {options.out / 'gpu.json'} and {options.out / 'gpu.md'}")
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
