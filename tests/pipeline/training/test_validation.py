"""Which validation was best and when patience ends, as plain numbers; and in a real run, through an interruption."""

from __future__ import annotations

import json
import re

import pytest

from pipeline import models
from pipeline.config import RunConfig
from pipeline.models import checkpoint
from pipeline.training.validation import BestSoFar, Measured
from tests.runs import FADER, JUDGE, make_run
from tests.warm import forked

KNOWN = ["swap_accuracy", "mse", "psnr"]


def best_so_far(**settings) -> BestSoFar:
    return BestSoFar(RunConfig(**settings), "swap_accuracy", KNOWN)


def note(state: BestSoFar, *values: tuple[float, float]) -> list[bool]:
    return [state.note(Measured(100 * k, {"swap_accuracy": v, "mse": mse})) for k, (v, mse) in enumerate(values, 1)]


def test_the_best_is_the_highest_accuracy_inside_the_bound():
    state = best_so_far(best_mse=0.1)
    assert note(state, (0.5, 0.08), (0.9, 0.2), (0.6, 0.09), (0.55, 0.01)) == [True, False, True, False]
    assert (state.best.images, state.best.value) == (300, 0.6)


def test_one_outside_the_bound_is_best_until_one_inside_comes():
    assert note(best_so_far(best_mse=0.1), (0.9, 0.3), (0.95, 0.2), (0.1, 0.1), (0.99, 0.11)) == [True, True, True, False]


def test_without_a_bound_of_its_own_it_follows_the_lowest_mse():
    """0.9 at an MSE of 0.5 is left behind when 0.3 has been seen: 0.5 > 1.25 · 0.3."""
    state = best_so_far()
    assert note(state, (0.9, 0.5), (0.7, 0.3), (0.8, 0.37), (0.99, 0.38)) == [True, True, True, False]
    assert note(best_so_far(best_mse_factor=0.0), (0.9, 0.5), (0.7, 0.3), (0.91, 9.0)) == [True, False, True]


def test_a_metric_that_is_better_when_lower():
    assert note(best_so_far(best="mse"), (0.1, 0.5), (0.9, 0.6), (0.1, 0.4)) == [True, False, True]


def test_patience_is_counted_in_images_without_a_better_validation():
    state = best_so_far(patience_images=200)
    note(state, (0.5, 0.1), (0.6, 0.1), (0.6, 0.1))
    assert state.best.images == 200 and not state.stalled(399) and state.stalled(400)
    assert not best_so_far().stalled(10**9), "no patience is given, none is at an end"
    assert not best_so_far(patience_images=1).stalled(10**9), "nothing was measured yet"


def test_patience_may_go_by_another_metric():
    state = best_so_far(patience_images=150, patience_metric="psnr")
    for images, psnr in ((100, 20.0), (200, 21.0), (300, 20.5)):
        state.note(Measured(images, {"swap_accuracy": 1 - images / 1000, "mse": 0.1, "psnr": psnr}))
    assert state.best.images == 100 and not state.stalled(349) and state.stalled(350)


def test_what_was_seen_survives_as_plain_numbers():
    values = [(0.5, 0.4), (0.7, 0.3), (0.6, 0.2), (0.65, 0.21), (0.9, 0.9)]
    for cut in range(len(values)):
        whole, first, second = (best_so_far(patience_images=200, patience_metric="mse") for _ in range(3))
        expected = note(whole, *values)
        note(first, *values[:cut])
        second.load(json.loads(json.dumps(first.state())))
        rest = [second.note(Measured(100 * k, {"swap_accuracy": v, "mse": m})) for k, (v, m) in enumerate(values, 1) if k > cut]
        assert rest == expected[cut:] and second.state() == whole.state() and second.best == whole.best


def test_another_metric_begins_anew():
    state, other = best_so_far(), best_so_far(best="psnr")
    note(state, (0.5, 0.1))
    other.load(state.state())
    assert other.best is None and other.lowest_mse == 0.1


def test_a_metric_that_is_not_measured_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="run.best: validation measures no 'swap_acuracy'; did you mean swap_accuracy"):
        best_so_far(best="swap_acuracy")
    with pytest.raises(ValueError, match="run.patience_metric.*there are: mse, psnr, swap_accuracy.*evaluate_tables"):
        best_so_far(patience_metric="leak.Smiling")
    with pytest.raises(ValueError, match="run.keep_best: validation measures no 'psrn'; did you mean psnr"):
        best_so_far(keep_best={"mse": "min", "psrn": "max"}, evaluate_images=1)
    with pytest.raises(ValueError, match="set run.evaluate_images"):
        RunConfig(keep_best={"mse": "min"})


# --- in a run ---------------------------------------------------------------------------------------------------------

CONFIG = """
name: tiny
method: {name: fader, preset: small, init_channels: 4, max_channels: 8, num_layers: 3, images: 640,
         latent: {weight: 0.1, ramp_images: 200, hidden_channels: 8}, ema_half_life: 100}
data: {path: FACES, attributes: [Smiling, Blond_Hair], image_size: 32, threads: 1}
batch_size: 8
judge: JUDGE
run: {log_images: 0, checkpoint_images: 160, picture_images: 0, evaluate_images: 80, evaluate_records: 10, keep: 1,
      best: psnr, best_mse_factor: 0.0}
tracking: {enabled: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, faces):
    folder = tmp_path_factory.mktemp("validated")
    from pipeline.data.shards import ShardSet

    attributes = ShardSet.open(faces).attributes
    data = {"path": str(faces), "attributes": ["Smiling", "Blond_Hair"]}
    judge = make_run(folder / "judge", JUDGE, data=data, attributes=attributes)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("FACES", str(faces)).replace("JUDGE", str(judge)))
    return path


@pytest.mark.ranks
def test_the_best_checkpoint_and_what_was_measured_survive_a_stop(config, tmp_path):
    """Unbroken on two ranks, and stopped half-way and resumed on one: the same numbers, the same best."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    forked("launch.train", config, f"run.folder={whole}", processes=2)
    forked("launch.train", config, f"run.folder={broken}", "method.images=320")
    forked("launch.train", "--resume", broken, "method.images=640")
    about = [json.loads((run / "checkpoints" / "best.json").read_text()) for run in (whole, broken)]
    assert about[0]["metric"] == "psnr" and about[0]["images"] == about[1]["images"]
    assert about[0]["value"] == pytest.approx(about[1]["value"], rel=1e-4)
    states = [checkpoint.read(checkpoint.latest(run))[1]["validation"] for run in (whole, broken)]
    assert states[0]["best"]["images"] == states[1]["best"]["images"] == about[0]["images"]
    last = checkpoint.latest(broken)
    measured = [checkpoint.metrics_of(path)["psnr"] for path in (last, checkpoint.latest(whole))]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert checkpoint.finished(broken)
    best = models.load(f"{broken}@best")
    assert best.card["images_seen"] == about[0]["images"] and best.card["ema"]
    raw = models.load(broken, checkpoint="best", ema=False)
    assert raw.source == f"{broken}@best" and raw.variant.endswith("-raw") and not raw.card["ema"]


def test_patience_ends_a_run_and_a_resume_does_not_begin_it_again(config, tmp_path):
    """A slider that learns nothing: its accuracy never rises after the first validation."""
    run = tmp_path / "run"
    words = ["run.patience_metric=judge_accuracy", "run.patience_images=160", "run.keep_best={psnr: min}"]
    done = forked("launch.train", config, f"run.folder={run}", *words)
    assert "no better judge_accuracy: training ends" in done.stderr
    assert checkpoint.images_of(checkpoint.latest(run)) == 240
    worst = checkpoint.by_metric(checkpoint.kept(run), "psnr", "min")[0]
    assert checkpoint.images_of(worst) == 80 and "psnr" in checkpoint.metrics_of(worst), "the first one, though old"
    forked("launch.train", "--resume", run)
    assert checkpoint.images_of(checkpoint.latest(run)) == 240


def test_the_best_is_spared_when_older_ones_go(tmp_path):
    import torch

    from pipeline.engine import State
    from pipeline.training.retention import CheckpointWriter

    writer = CheckpointWriter(tmp_path, keep=1)
    for images in (100, 200, 300, 400):
        best = {"metric": "mse", "value": 0.1} if images in (100, 200) else None
        writer.save(images, State({"a/b": torch.zeros(1)}, {}, {}), {}, validated_best=best)
    writer.close()
    assert [checkpoint.images_of(path) for path in checkpoint.kept(tmp_path)] == [400, 200]
    assert checkpoint.images_of(checkpoint.named(tmp_path, "best")) == 200
    assert checkpoint.named(tmp_path, "images-400") == checkpoint.latest(tmp_path)
    there = re.escape("keeps no checkpoint images-100; there are: images-200, images-400, latest, best")
    with pytest.raises(ValueError, match=there):
        checkpoint.named(tmp_path, "images-100")
    with pytest.raises(ValueError, match="'newest' is none of latest, best, images-N"):
        checkpoint.named(tmp_path, "newest")
    (checkpoint.validated(tmp_path) / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="does not match its digest"):
        checkpoint.named(tmp_path, "best")


def test_only_a_run_has_checkpoints_to_choose(tmp_path):
    run = make_run(tmp_path / "run", FADER)
    models.export(run, tmp_path / "export")
    with pytest.raises(ValueError, match="is no run: only a run keeps checkpoints"):
        models.load(tmp_path / "export", checkpoint="best")
    with pytest.raises(ValueError, match="keeps no checkpoint best"):
        models.load(f"{run}@best")
    assert models.load(f"{run}@images-3200").variant == "", "it is the newest"
