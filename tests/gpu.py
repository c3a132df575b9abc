"""`make gpu`: every check and benchmark that needs CUDA, in one go; one JSON and one Markdown table.

    python -m tests.gpu [--out FOLDER] [--only CELL...] [--dry-run]

It should take some five minutes on 16 cores, which has not been timed. With no GPU, or with --dry-run, it says what it would run and exits 0;
otherwise it exits 1 when a cell fails. It needs the folder of the project on the path, and neither the project installed
nor MLflow.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.cells import CELLS, cell, run_cells

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")  # the CPU only where a test tries a cell
SWEEP = ("method.images=1600", "tracking.enabled=false")
SWEPT = ("run.evaluate_images=800", "method.latent.weight=0,1e-3")
SWEPT_RUN = "latent.weight-1e-3"  # the second of them
WARM_STEPS = 5  # before the clock runs
FP16 = ("precision=fp16", "method.images=3200", "run.evaluate_images=0", "judge=null", "tracking.enabled=false")


def settle() -> None:
    """Wait until the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def marked_files() -> list[Path]:
    """Return the test files with tests that need CUDA; the others may import what is not installed beside a GPU."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if path != ROOT / "tests/test_gpu.py")
    return [path for path in files if re.search(r"mark\.gpu|\bother_device\b", path.read_text(encoding="utf-8"))]


def pytest_line(*words: str) -> list[str]:
    """Return the command that runs, or with `words` does something else with, the tests marked `gpu`."""
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *words, *map(str, marked_files())]


@cell(150)
def marked_tests() -> dict[str, Any]:
    """Every test marked `gpu`."""
    done = subprocess.run(pytest_line(), cwd=ROOT, capture_output=True, text=True)
    tail = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    if done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-1000:])
    return {"pytest": tail[0] if tail else ""}


def _training_rate(
    preset: str, image_size: int, batch_size: int, precision: str, seconds: float = 4.0, **settings: Any
) -> dict[str, Any]:
    import fader.methods  # noqa: F401  fills METHODS
    from fader.adversaries.latent import LatentSettings
    from fader.attributes import Attribute, Attributes
    from fader.method import METHODS, Batch, Clock
    from pipeline.config import EngineConfig
    from pipeline.engine import Engine

    kind = METHODS["fader"]
    torch.manual_seed(0)
    of_method = kind.Settings(preset=preset, latent=LatentSettings(ramp_images=0, weight=1e-3))
    method = kind(of_method, Attributes([Attribute("Smiling")]), image_size)
    engine = Engine(method, precision=precision, settings=EngineConfig(**settings))
    images = torch.rand(batch_size, 3, image_size, image_size, device=engine.device) * 2 - 1
    labels = torch.randint(0, 2, (batch_size, 1), device=engine.device).float()
    phases = method.stages()[0].phases
    steps, began, first = 0, time.monotonic(), {}
    while steps <= WARM_STEPS or time.monotonic() - began < seconds:
        if steps == WARM_STEPS:
            settle()
            began = time.monotonic()
        for phase in phases:
            report = engine.update(phase, Batch.alone(images, labels, stream=phase.stream, draw=steps), Clock())
        if steps % 20 == 0:
            settle()
        first = first or {name: float(value) for name, value in report.items()}
        steps += 1
    settle()
    rate = (steps - WARM_STEPS) * batch_size / (time.monotonic() - began)
    last = {name: float(value) for name, value in report.items()}
    assert last["autoencoder/mse"] < first["autoencoder/mse"], "it did not learn one batch"
    assert last["encoder+decoder/skipped"] == 0
    result = {"images/s": round(rate), "mse": [first["autoencoder/mse"], last["autoencoder/mse"]]}
    if DEVICE.type == "cuda":
        result["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


@cell(60, timed=True)
def train_small_64_bf16() -> dict[str, Any]:
    """The small network at 64 pixels in bf16, batches of 256."""
    return _training_rate("small", 64, 256, "bf16")


@cell(60, timed=True)
def train_small_64_batch_32_bf16() -> dict[str, Any]:
    """The same, batches of 32."""
    return _training_rate("small", 64, 32, "bf16")


@cell(60, timed=True)
def train_official_256_bf16() -> dict[str, Any]:
    """The official network at 256 pixels in bf16, batches of 64."""
    return _training_rate("official", 256, 64, "bf16")


@cell(60, timed=True)
def train_official_256_batch_32_bf16() -> dict[str, Any]:
    """The official network at 256 pixels in bf16, batches of 32."""
    return _training_rate("official", 256, 32, "bf16")


@cell(60, timed=True)
def train_official_256_batch_256_bf16() -> dict[str, Any]:
    """The same, batches of 256."""
    return _training_rate("official", 256, 256, "bf16")


@cell(60, timed=True)
def train_official_256_batch_256_padded_bf16() -> dict[str, Any]:
    """The same, with channels padded to multiples of 8."""
    return _training_rate("official", 256, 256, "bf16", channel_multiple=8)


@cell(60, timed=True)
def train_paper_256_batch_256_bf16() -> dict[str, Any]:
    """The paper's network at 256 pixels in bf16, batches of 256."""
    return _training_rate("paper", 256, 256, "bf16")


@cell(150, timed=True)
def bench_train_celeba_fader() -> dict[str, Any]:
    """`fader bench train` on the shipped config in bf16: eager, captured, padded, compiled, beside a bare captured loop."""
    return _step_rates("eager,captured,padded,compiled,bare captured", "1", "precision=bf16")


def _step_rates(ways: str, seconds: str, *settings: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        words = [word for setting in settings for word in ("--set", setting)]
        words += ["--ways", ways, "--rounds", "2", "--seconds", seconds, "--json", str(out)]
        command("bench", "train", "configs/celeba_fader.yaml", *words)
        rows = json.loads(out.read_text())["rows"]
    return {row["way"]: round(statistics.median(row["images_per_second"])) for row in rows}


@cell(60, timed=True)
def train_official_256_fp32() -> dict[str, Any]:
    """The same in float32."""
    return _training_rate("official", 256, 64, "fp32")


@cell(120, timed=True)
def loader_mixed_decode_128() -> dict[str, Any]:
    """Drawn faces decoded on the GPU: streamed and kept images a second, and that both agree to the bit."""
    return _loading_rates(128, 2000, 256, ("none", "device", "host"))


def _loading_rates(size: int, count: int, batch_size: int, caches: tuple[str, ...], seconds: float = 3.0) -> dict[str, Any]:
    from pipeline.data.shards import ShardSet
    from pipeline.images import Preprocessing
    from pipeline.loading.dali import open_loader
    from pipeline.loading.plan import Plan, Request

    with tempfile.TemporaryDirectory() as folder:
        command("prepare", "faces", f"{folder}/set", "--count", str(count))
        shards = ShardSet.open(f"{folder}/set")
        split = shards.split("train")
        plan = Plan(len(split), seed=0)
        rates: dict[str, Any] = {}
        firsts = []
        for cache in caches:
            options = {"seed": 0, "device": DEVICE, "threads": 8}
            loader = open_loader("dali", cache, split, shards.attributes, Preprocessing(size), **options)
            batches = loader.batches(Request("x", k, plan.rows("x", k, batch_size), flip=True) for k in range(10**6))
            firsts.append(next(batches).images.clone())
            for _ in range(len(split) // batch_size + 5):  # what is kept is kept by then
                next(batches)
            settle()
            began, done = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                next(batches)
                done += 1
                if done % 20 == 0:
                    settle()
            settle()
            rates[f"cache {cache} images/s"] = round(done * batch_size / (time.monotonic() - began))
            batches.close()
        assert all(torch.equal(firsts[0], other) for other in firsts[1:]), "streamed and kept batches differ"
        return rates


@cell(60, timed=True)
def augmentation_128() -> dict[str, Any]:
    """All of augmentation: images a second, and that the GPU's are the CPU's but for rounding."""
    return _augmentation_rate(128, 256, times=200)


def _augmentation_rate(size: int, count: int, times: int) -> dict[str, Any]:
    from fader.draws import Draws
    from pipeline.config import AugmentConfig
    from pipeline.loading.augmentation import augmented

    settings = AugmentConfig(
        rotation_degrees=5, translation=0.03, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02
    )
    images, index = torch.rand(count, 3, size, size) * 2 - 1, torch.arange(count)
    here = augmented(images, Draws.of(0, "x", 0, index), settings)
    images, index = images.to(DEVICE), index.to(DEVICE)
    apart = float((augmented(images, Draws.of(0, "x", 0, index), settings).cpu() - here).abs().max())
    assert apart < 1e-3, apart
    settle()
    began = time.monotonic()
    for draw in range(times):
        augmented(images, Draws.of(0, "x", draw, index), settings)
    settle()
    return {"images/s": round(times * count / (time.monotonic() - began)), "from the CPU": apart}


def command(name: str, *words: str) -> None:
    """Run one of the project's commands to its end.

    Raises:
        AssertionError: it failed; its last lines are in the message.
    """
    _run([sys.executable, "-m", f"launch.{name}", *words])


def _launch(launcher: list[str], module: str, *words: str) -> None:
    _run([sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0", "-m", module, *words])


def _run(line: list[str]) -> None:
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


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
        command("prepare", "faces", f"{folder}/set", "--count", "400")
        run = Path(folder) / "run"
        settings = (f"data.path={folder}/set", f"run.folder={run}", *FP16)
        _launch(["--config_file", "launch/accelerate/one_gpu.yaml"], "launch.train", "configs/faces_fader.yaml", *settings)
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert saved[-1].endswith("3200"), saved
        return {"checkpoint": saved[-1]}


@cell(240)
def sweep_validate_and_evaluate() -> dict[str, Any]:
    """A judge, a sweep of two runs that validate while they train, and the best checkpoint's tables, as on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        shared = (f"data.path={folder}/set", *SWEEP)
        command("prepare", "faces", f"{folder}/set", "--count", "400")
        command("train", "configs/faces_judge.yaml", *shared, f"run.folder={folder}/judge")
        swept = (*shared, f"judge={folder}/judge", *SWEPT)
        command("sweep", "configs/faces_fader.yaml", *swept, "--folder", f"{folder}/sweep")
        metrics = {}
        for device in ("cuda", "cpu"):
            file = Path(folder) / f"{device}.json"
            command("evaluate", f"{folder}/sweep/{SWEPT_RUN}@best", "--device", device, "--json", str(file))
            metrics[device] = json.loads(file.read_text())["metrics"]
        apart = {name: abs(metrics["cuda"][name] - metrics["cpu"][name]) for name in ("test/mse", "test/swap_accuracy")}
        assert metrics["cuda"].keys() == metrics["cpu"].keys() and max(apart.values()) < 0.02, apart
        return {"from the CPU": apart, "swap accuracy": metrics["cuda"]["test/swap_accuracy"]}


@cell(240, timed=True)
def bench_data_cuda() -> dict[str, Any]:
    """`fader bench data` on the GPU: streamed beside DALI alone, which is the limit, and kept on the device."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        words = "--sizes 128,256 --count 4000 --batch-size 256 --threads 8 --rounds 2 --seconds 1 --device cuda".split()
        command("bench", "data", *words, "--json", str(out))
        rates = json.loads(out.read_text())["images_per_second"]
    names = ("bare", "floats", "streamed", "cached", "webdataset", "files")
    return {size: {name: round(statistics.median(of[name])) for name in names} for size, of in rates.items()}


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


def plan(names: list[str]) -> str:
    """Say what would run, in this order, and which tests are marked `gpu`.

    Raises:
        RuntimeError: the marked tests cannot be collected.
    """
    lines = []
    for timed, head in ((False, "beside each other:"), (True, "one after another, because they measure speed:")):
        cells = [(name, CELLS[name]) for name in names if CELLS[name].timed == timed]
        lines += [head, *(f"  {name} (at most {each.seconds} s): {each.says}" for name, each in cells)] if cells else []
    if "marked_tests" in names:
        done = subprocess.run(pytest_line("--collect-only"), cwd=ROOT, capture_output=True, text=True)
        tests = [line for line in done.stdout.splitlines() if "::" in line]
        if done.returncode or not tests:
            raise RuntimeError(f"the tests marked gpu cannot be collected:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        lines += [f"tests marked gpu, {len(tests)}:", *(f"  {test}" for test in tests)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", nargs="*", choices=list(CELLS), metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args()
    names = options.only or list(CELLS)
    if options.dry_run or not torch.cuda.is_available():
        why = "dry run" if options.dry_run else f"no GPU: torch {torch.__version__} sees no CUDA device"
        print(f"{why}, so none of these {len(names)} cells is run:\n{plan(names)}")
        return
    began, rows = time.monotonic(), []
    for row in run_cells(names):
        rows.append(row)
        print(json.dumps(row), flush=True)
    about = hardware() | {"seconds": str(round(time.monotonic() - began))}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps({"hardware": about, "cells": rows}, indent=1))
    (options.out / "gpu.md").write_text(markdown(about, rows))
    print(f"{len(rows)} cells took {about['seconds']} s; wrote {options.out / 'gpu.json'} and {options.out / 'gpu.md'}")
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
