"""`fader compare`: what differs stands side by side, and nothing that does not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from launch.command import main
from launch.compare import compare
from pipeline import tracking
from pipeline.evaluation import compare as comparison
from tests.runs import FADER, make_run


def evaluated(run, swap, mse, judge="judge", digests=()):
    content = {
        "judge": judge, "judge_digests": list(digests),
        "split_digest": "d",
        "records": 40,
        "images_seen": 3200,
        "intervals": {"test/swap_accuracy": [swap - 0.01, swap + 0.01], "test/mse": [mse * 0.9, mse * 1.1]},
        "metrics": {"test/swap_accuracy": swap, "test/mse": mse, "test/swap_accuracy.Smiling_to_1": swap},
    }
    (run / "report").mkdir(exist_ok=True)
    (run / "report" / "evaluation-test.json").write_text(json.dumps(content))
    return run


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in λ alone; the first was tracked, and rewound once."""
    first = make_run(tmp_path / "first", FADER | {"latent": {"weight": 1e-3}}, run={"folder": "a"})
    second = make_run(tmp_path / "second", FADER | {"latent": {"weight": 1e-2}})
    tracker = tracking.MlflowTracker(first, "experiment", "first", deliver=False)
    tracker.start()
    tracker.log({"autoencoder/mse": 0.5, "autoencoder/skipped": 0.0}, 32, 1)
    tracker.log({"autoencoder/mse": 0.9}, 64, 2)
    tracker.rewound(32, "not finite")
    tracker.finish("FINISHED")
    return evaluated(first, 0.7, 0.01), evaluated(second, 0.9, 0.02)


def command(capsys, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main(compare)
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_what_differs_stands_side_by_side(runs, tmp_path):
    found = [comparison.read(str(run)) for run in runs]
    settings, losses, metrics = comparison.as_tables(found)
    assert settings.header == ["", "first", "second"]
    assert settings.rows == [["method.latent.weight", "0.001", "0.01"]], "names and places are no settings"
    assert losses.rows == [["autoencoder/mse", "0.5", "–"]], "what a rewind superseded is no last loss"
    rows = {row[0]: row[1:] for row in metrics.rows}
    assert rows["swap_accuracy"] == ["0.7", "0.9"] and rows["mse"] == ["0.01", "0.02"]
    assert list(rows) == ["images_seen", "mse", "swap_accuracy", "swap_accuracy.Smiling_to_1"]
    assert found[0].intervals["swap_accuracy"] == pytest.approx((0.69, 0.71)) and not comparison.warnings(found, "test")
    of_sizes = [dataclasses.replace(run, rests_on={"image_size": size}) for run, size in zip(found, (64, 128))]
    assert "different sizes of pictures: their numbers are not comparable" in comparison.warnings(of_sizes, "test")[0]


def test_the_command_writes_the_plot_and_says_what_cannot_be_compared(runs, tmp_path, capsys, monkeypatch):
    third = evaluated(make_run(tmp_path / "third", FADER), 0.5, 0.03, judge="another")
    plot, file = tmp_path / "out" / "plot.png", tmp_path / "out" / "all.json"
    code, out, _ = command(capsys, monkeypatch, *runs, third, "--plot", plot, "--json", file)
    assert code == 0 and f"wrote {plot}" in out and "different judges" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [run["metrics"]["mse"] for run in json.loads(file.read_text())] == [0.01, 0.02, 0.03]
    assert "first" in out and "method.latent.weight" in out
    third = evaluated(third, 0.5, 0.03, digests=["another"])
    _, out, _ = command(capsys, monkeypatch, *runs, third, "--plot", plot)
    assert "different judges" in out, "one was trained anew at the same address"
    code, out, _ = command(capsys, monkeypatch, *runs, "--split", "valid")
    assert code == 0 and "was not evaluated on the valid split" in out and "no plot" in out


def test_what_is_no_run_is_said(tmp_path, capsys, monkeypatch):
    code, _, err = command(capsys, monkeypatch, tmp_path)
    assert code == 2 and "is no run's folder" in err
