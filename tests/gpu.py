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
import statistics
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
    from pipeline.data.shards import ShardSet
    from pipeline.images import Preprocessing
    from pipeline.loading.dali import open_loader
    from pipeline.loading.plan import Plan, Request

    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "launch.prepare", "faces", f"{folder}/set", "--count", "4000"]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        shards = ShardSet.open(f"{folder}/set")
        split = shards.split("train")
        plan = Plan(len(split), seed=0)
        rates: dict[str, Any] = {}
        firsts = []
        for cache in ("none", "device", "host"):
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
            rates[f"cache {cache} images/s"] = round(count / (time.monotonic() - began))
            batches.close()
        assert all(torch.equal(firsts[0], other) for other in firsts[1:]), "streamed and kept batches differ"
        return rates


@cell(60)
def augmentation_128() -> dict[str, Any]:
    """Everything on, pictures a second; and as far from the CPU's as rounding goes."""
    from fader.draws import Draws
    from pipeline.config import AugmentConfig
    from pipeline.loading.augmentation import augmented

    settings = AugmentConfig(
        rotation_degrees=5, translation=0.03, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02
    )
    images, index = torch.rand(256, 3, 128, 128) * 2 - 1, torch.arange(256)
    here = augmented(images, Draws.of(0, "x", 0, index), settings)
    images, index = images.cuda(), index.cuda()
    apart = float((augmented(images, Draws.of(0, "x", 0, index), settings).cpu() - here).abs().max())
    assert apart < 1e-3, apart
    torch.cuda.synchronize()
    began = time.monotonic()
    for draw in range(200):
        augmented(images, Draws.of(0, "x", draw, index), settings)
    torch.cuda.synchronize()
    return {"images/s": round(200 * 256 / (time.monotonic() - began)), "from the CPU": apart}


def _launch(launcher: list[str], module: str, *words: str) -> None:
    line = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0", "-m", module, *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


@cell(180)
def ranks_over_nccl() -> dict[str, Any]:
    """DDP and ZeRO-1 on two GPUs end with the weights of one; on a single GPU, ZeRO-1's sums over a world of one."""
    from safetensors.torch import load_file

    from tests import ranks
    from tests.pipeline.engine.test_ranks import distance, of, same

    count = min(torch.cuda.device_count(), 2)
    name = "one_node" if count == 2 else "deepspeed_zero1"
    one = ranks.run(ranks.Case("fader", wide=False, steps=5))
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config_file", f"launch/accelerate/{name}.yaml", "--num_processes", str(count)]
        _launch(words, "tests.ranks", folder, "one")
        found = [load_file(f"{folder}/rank{rank}.safetensors") for rank in range(count)]
    backends = ("ddp", "zero1") if count == 2 else ("deepspeed",)
    apart = {f"{name} from one GPU": distance(one, of(found[0], f"{name}/fader")) for name in backends}
    assert all(same(found[0], other) for other in found), "ranks differ"
    assert max(apart.values()) < 1e-2, apart  # convolutions in TF32
    return {"ranks": count, **apart}


@cell(180)
def train_by_one_gpu_yaml_fp16() -> dict[str, Any]:
    """The training command by Accelerate's launcher on one GPU, from drawn faces to a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "launch.prepare", "faces", f"{folder}/set", "--count", "400"]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        run = Path(folder) / "run"
        settings = (
            f"data.path={folder}/set", f"run.folder={run}", "precision=fp16", "method.images=3200",
            "run.evaluate_images=0", "judge=null", "tracking.enabled=false",
        )  # fmt: skip
        launcher = ["--config_file", "launch/accelerate/one_gpu.yaml"]
        _launch(launcher, "launch.train", "configs/faces_fader.yaml", *settings)
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert saved[-1].endswith("3200"), saved
        return {"checkpoint": saved[-1]}


@cell(500)
def bench_data_cuda() -> dict[str, Any]:
    """`fader bench data` on the GPU: streamed beside DALI alone, which is the limit, and kept on the device."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        words = "--sizes 128,256 --count 6000 --batch-size 256 --threads 8 --rounds 3 --seconds 2 --device cuda".split()
        line = [sys.executable, "-m", "launch.bench", "data", *words, "--json", str(out)]
        subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
        found = json.loads(out.read_text())["images_per_second"]
    names = ("bare", "floats", "streamed", "cached", "webdataset", "files")
    return {size: {name: round(statistics.median(rates[name])) for name in names} for size, rates in found.items()}


@cell(400)
def sweep_validate_and_evaluate() -> dict[str, Any]:
    """A judge, a sweep of two runs that validate while they train, and the best checkpoint's tables, as on the CPU."""
    with tempfile.TemporaryDirectory() as folder:

        def fader(name: str, *words: str) -> None:
            done = subprocess.run([sys.executable, "-m", f"launch.{name}", *words], cwd=ROOT, capture_output=True, text=True)
            assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]

        shared = (f"data.path={folder}/set", "method.images=3200", "tracking.enabled=false")
        fader("prepare", "faces", f"{folder}/set", "--count", "400")
        fader("train", "configs/faces_judge.yaml", *shared, f"run.folder={folder}/judge")
        words = (*shared, f"judge={folder}/judge", "run.evaluate_images=1600", "method.lambda_max=0,1e-3")
        fader("sweep", "configs/faces_fader.yaml", *words, "--folder", f"{folder}/sweep")
        found = {}
        for device in ("cuda", "cpu"):
            file = Path(folder) / f"{device}.json"
            fader("evaluate", f"{folder}/sweep/lambda_max-1e-3@best", "--device", device, "--json", str(file))
            found[device] = json.loads(file.read_text())["metrics"]
        apart = {name: abs(found["cuda"][name] - found["cpu"][name]) for name in ("test/mse", "test/swap_accuracy")}
        assert found["cuda"].keys() == found["cpu"].keys() and max(apart.values()) < 0.02, apart
        return {"from the CPU": apart, "swap accuracy": found["cuda"]["test/swap_accuracy"]}


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
