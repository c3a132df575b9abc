"""`fader bench data` measures everyone it names, in one run, and writes what it prints."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fader.attributes import Attribute, Attributes
from fader.networks.normalization import BatchNorm
from launch import bench
from launch.bench_train import FOUR
from pipeline import config
from pipeline.loading.throughput import median_ratio
from tests.commands import launch


def test_one_run_measures_all_and_writes_it(tmp_path):
    out = tmp_path / "bench.json"
    words = "--count 60 --sizes 32 --rounds 1 --seconds 0.02 --batch-size 8 --device cpu".split()
    done = launch("launch.bench", "data", *words, "--json", out)
    found = json.loads(out.read_text())
    rates = found["images_per_second"]["32"]
    names = {"bare", "floats", "streamed", "cached", "webdataset", "files"}
    assert set(rates) == names and all(len(rates[name]) == 1 and min(rates[name]) > 0 for name in names)
    medians = {name: statistics.median(rates[name]) for name in names}
    assert medians["cached"] > medians["files"], "gathering from memory is faster than decoding in any weather"
    assert set(found["prepare_seconds"]) == {"prepare", "prepare header", "tar"} and found["set"]["records"] == 48
    assert {"cpu", "cores", "torch", "nvidia-dali-cuda130", "load"} <= set(found["machine"])
    for shown in ("of tar's speed", "streamed/bare", f"{medians['cached']:,.0f}", str(out)):
        assert shown in done.stdout


def test_a_ratio_is_of_rounds_and_not_of_medians():
    """A round in which the machine was slow for both does not count against either."""
    assert median_ratio({"a": [100, 10, 50], "b": [200, 20, 100]}, "a", "b") == 0.5
    assert median_ratio({"a": [10, 100, 110], "b": [100, 100, 100]}, "a", "b") == 1.0


@pytest.mark.parametrize("sizes", ["64,big", "", "0", "-64"])
def test_sizes_that_are_no_numbers_are_refused(sizes):
    with pytest.raises(ValueError, match="--sizes is .* whole numbers parted by commas"):
        bench.data(sizes=sizes)


SMALL = ["data.image_size=32", "method.init_channels=4", "method.max_channels=8", "method.hidden_channels=8"]


def test_a_step_is_measured_beside_a_bare_loop(tmp_path):
    out = tmp_path / "bench.json"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    words = [*settings, "--batch-sizes", "4,8", "--rounds", "2", "--seconds", "0.01", "--json", str(out)]
    done = CliRunner().invoke(bench.app, ["train", "configs/celeba_judge.yaml", *words], catch_exceptions=False)
    rows = json.loads(out.read_text())["rows"]
    assert {(row["way"], row["batch_size"]) for row in rows} >= {(way, size) for way in ("eager", "bare") for size in (4, 8)}
    for row in rows:
        assert len(row["images_per_second"]) == 2 and min(row["images_per_second"]) > 0 and row["kernels"] > 20
    flops = {row["batch_size"]: row["flops"] for row in rows}
    assert flops[8] == pytest.approx(2 * flops[4], rel=0.01) and flops[4] > 1e5
    assert "of bare" in done.stdout and "batches of 8" in done.stdout and str(out) in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize(("way", "said"), [("captured", "needs CUDA"), ("fast", "is none of")])
def test_a_way_that_cannot_be_measured_is_refused(way, said):
    with pytest.raises(ValueError, match=said):
        CliRunner().invoke(bench.app, ["train", "--ways", way], catch_exceptions=False)


def test_scaling_is_its_formula_and_is_checked_between_processes(tmp_path):
    """Counted sums: two for each batch norm of a pass with a gradient, and label counts; a model worked by hand; two processes that train."""
    out = tmp_path / "scale.json"
    words = ["--batch-size", "4", "--processes", "2", "--steps", "2", "--step", "2", "--json", str(out)]
    words += [word for setting in SMALL for word in ("--set", setting)]
    done = CliRunner().invoke(bench.app, ["scale", "configs/celeba_judge.yaml", *words], catch_exceptions=False)
    found = json.loads(out.read_text())
    method = config.build_method(config.load(Path("configs/celeba_judge.yaml"), SMALL), Attributes(list(map(Attribute, FOUR))))
    network, counts = method.networks["classifier"], method.networks["label_counts"].counts
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(found["traffic"]["sums"]) == 2 * len(norms) + 1 > 1
    of_norms = sum(2 * 4 * (2 * len(norm.weight) + 1) for norm in norms)
    assert sum(found["traffic"]["sums"]) == of_norms + 8 * len(counts)
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert found["traffic"]["gradients"] == [weights]
    rows = {row["ranks"]: row for row in found["rows"]}
    assert rows[1]["gradients"] == rows[1]["sums"] == 0 and rows[1]["of_one"] == 1 and max(rows) == 1024
    by_hand = 2 * weights * (7 / 8 / 450e9 + 127 / 128 / 8 / 50e9) + 2 * (3 + 7) * 10e-6
    assert rows[1024]["gradients"] == pytest.approx(by_hand, rel=1e-9)
    assert rows[1024]["seconds"] == pytest.approx(0.002 + rows[1024]["gradients"] + rows[1024]["sums"])
    check = found["checks"]["2"]
    assert check["predicted"] > check["computing"] > 0 and check["measured"] > 0
    assert "2 processes of this CPU over gloo" in done.stdout
