"""`fader evaluate` from tars to tables: real shards and loader, planted pictures, runs as training leaves them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.command import main
from launch.evaluate import evaluate
from pipeline import config, tracking
from pipeline import models as registry
from pipeline.data.datasets import Dataset
from pipeline.data.shards import ShardSet, prepare
from pipeline.evaluation import Specification, keeping
from pipeline.images import Preprocessing, to_uint8
from pipeline.models import checkpoint
from pipeline.ownership import owned
from pipeline.training import judges
from tests.pipeline.evaluation.test_evaluation import SIZE, Identity, Oracle, OtherSeer, Seer, levels, painted
from tests.runs import ATTRIBUTES, FADER, JUDGE, make_run
from tests.warm import forked

DATA = {"image_size": SIZE, "crop": "center"}
COUNTS = {"train": 60, "valid": 6, "test": 40}


def labels(number: int) -> list[int]:
    return [number % 2, int(number // 2 % 5 == 0), number % 3]


def png(location: str) -> bytes:
    """A picture whose bands are its labels."""
    values = torch.tensor([[float(levels(a)[v]) for a, v in zip(ATTRIBUTES, labels(int(location)))]])
    image = painted(ATTRIBUTES, values, torch.zeros(1, 3, SIZE, SIZE))
    out = io.BytesIO()
    Image.fromarray(to_uint8(image)[0].numpy()).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A shard set of planted pictures."""
    splits = [name for name, count in COUNTS.items() for _ in range(count)]
    numbers = range(len(splits))
    dataset = Dataset(
        name="planted",
        source={"what": "planted pictures"},
        attribute_list=ATTRIBUTES.to_list(),
        keys=[f"{number:06d}" for number in numbers],
        splits=splits,
        locations=[str(number) for number in numbers],
        labels=np.array([labels(number) for number in numbers], np.float32),
        places=[f"row {number}" for number in numbers],
        read=png,
    )
    out = tmp_path_factory.mktemp("planted") / "shards"
    prepare(dataset, out, workers=1)
    return out


@pytest.fixture
def shams(shards, monkeypatch) -> dict[str, registry.Model]:
    """`registry.load` knows an oracle, an identity and a judge that is right."""
    card = {"config": {"data": {"path": str(shards)}}, "data_digest": ShardSet.open(shards).digest, "images_seen": 1}

    def model(source, method, *judges):
        return registry.Model(method, dict(card), method.attributes, Preprocessing(SIZE, "center"), judges, source)

    seer = model("seer", Seer(ATTRIBUTES))
    models = [model("oracle", Oracle(ATTRIBUTES), seer), model("models:/id@x", Identity(ATTRIBUTES)), seer]
    models.append(model("other", OtherSeer(ATTRIBUTES)))
    table = {found.source: found for found in models}
    monkeypatch.setattr(registry, "load", lambda source, **_: table[str(source)])
    return table


def run(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main(evaluate)
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_planted_truth_goes_from_tars_to_tables(shams, shards, tmp_path, capsys, monkeypatch):
    files = tmp_path / "new" / "e.json", tmp_path / "new" / "e.md"
    code, out, _ = run(
        capsys, monkeypatch, "oracle", "models:/id@x", "--json", files[0], "--markdown", files[1], "--device", "cpu"
    )
    assert code == 0
    oracle, identity = (report["metrics"] for report in json.loads(files[0].read_text()))
    assert oracle["test/judge_accuracy"] == oracle["test/swap_accuracy"] == 1.0
    assert identity["test/swap_accuracy"] == 0.0
    assert oracle["test/leak.Beard"] == 1.0 and identity["test/mse"] < 1e-9
    text = files[1].read_text()
    for title in ("1. Does it slide?", "Beard, each pair", "2. Fidelity", "along the slider", "3. Leak", "5. Cost"):
        assert title in out and title in text
    assert f"40 of 40 records of the test split (digest {ShardSet.open(shards).split('test').digest[:12]})" in text
    assert f"wrote {files[0]}" in out and f"wrote {files[1]}" in out
    assert out.rstrip().endswith("next: fader register oracle --name NAME")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["e.json", "e.md"]


def test_what_the_numbers_rest_on_is_said(shams, capsys, monkeypatch):
    shams["oracle"].card["data_digest"] = "f" * 64
    code, out, err = run(
        capsys, monkeypatch, "oracle", "--split", "train", "--limit", "50", "--tables", "swap", "--device", "cpu"
    )
    assert code == 0 and "evaluating oracle on 50 records of the train split" in err and "judged by seer" in err
    assert "TRAINING" in out and "50 of the 60 records" in out and "another data set" in out


def test_training_images_cannot_pass_for_test_images(shams, capsys, monkeypatch):
    """The defect of two public implementations, planted: asked for the test split, the set hands out training records."""
    split = ShardSet.split
    monkeypatch.setattr(ShardSet, "split", lambda self, name: split(self, "train"))
    code, out, _ = run(capsys, monkeypatch, "oracle", "--tables", "swap", "--device", "cpu")
    assert code == 0 and "TRAINING" in out
    with pytest.raises(AssertionError):
        test_what_a_fair_evaluation_says(shams, capsys, monkeypatch)


def test_what_a_fair_evaluation_says(shams, capsys, monkeypatch):
    words = ["oracle", "--tables", "swap", "--device", "cpu"]
    code, out, _ = run(capsys, monkeypatch, *words, "--judge", "seer,other")
    assert code == 0 and "TRAINING" not in out and "note:" not in out
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and out.count("note: oracle: whether swaps are flattered is NOT KNOWN") == out.count("note:") == 1


def test_a_judge_is_evaluated_alone(shams, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "seer", "--device", "cpu")
    assert code == 0 and "real" in out and "1.000" in out and "judge=seer" in out
    assert "reconstruction  " not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models:/id@x", "--judge", "oracle"], "oracle: sham is not a judge"),
        (["oracle", "--judge", "seer", "--judge", "./seer"], "./seer is named twice"),
        (["oracle", "--split", "tset"], "unknown split 'tset'"),
        (["oracle", "--data", "/nowhere"], "/nowhere"),
        (["oracle", "--tables", "swap,swop"], "unknown table 'swop'"),
        (["oracle", "--device", "tpu"], "device 'tpu'"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(shams, capsys, monkeypatch, words, message):
    code, _, err = run(capsys, monkeypatch, *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_data_that_is_not_here_is_asked_for(shams, capsys, monkeypatch):
    for path, message in (("/gone/shards", "/gone/shards, which is not here"), (None, "does not say which data")):
        shams["oracle"].card["config"] = {"data": {"path": path}}
        code, _, err = run(capsys, monkeypatch, "oracle")
        assert code == 2 and message in err and "--data" in err


@pytest.mark.ranks
def test_a_run_is_evaluated_by_the_judge_its_config_names_and_keeps_its_report(shards, tmp_path, capsys, monkeypatch):
    data = {"path": str(shards), **DATA}
    judge = make_run(tmp_path / "judge", JUDGE, data=data)
    fader = make_run(tmp_path / "fader", FADER, data=data, judge=str(judge))
    done = forked("launch.evaluate", fader, "--device", "cpu", "--batch-size", "16", cwd=tmp_path)
    report = fader / "report" / "evaluation-test.json"
    assert f"wrote {report}" in done.stdout and "another data set" in done.stdout
    content = json.loads(report.read_text())
    assert content["judge"] == str(judge) and content["records"] == 40 and content["images_seen"] == 3200
    assert content["cost"]["parameters"].keys() == {"encoder", "decoder"}
    assert (fader / "report" / "evaluation-test.md").read_text().startswith("# Evaluation")
    assert registry.load(fader).card["metrics"] == content["metrics"]
    two = tmp_path / "two.json"
    done = forked(
        "launch.evaluate", fader, "--device", "cpu", "--batch-size", "16", "--json", two, processes=2, cwd=tmp_path
    )
    assert done.stdout.count(f"wrote {report}") == 1, "one rank writes"
    numbers = json.loads(two.read_text())["metrics"]
    assert numbers.keys() == content["metrics"].keys() and len(numbers) > 40
    assert numbers == pytest.approx(content["metrics"], rel=1e-6, abs=1e-6)
    content = json.loads(report.read_text())
    other = make_run(tmp_path / "other", JUDGE, data={"path": str(shards), "image_size": 32, "crop": "center"})
    code, _, _ = run(capsys, monkeypatch, fader, "--limit", "20", "--tables", "swap", "--device", "cpu")
    assert code == 0 and json.loads(report.read_text()) == content, "part of a split must not pass for the split"
    assert json.loads((fader / "report" / "evaluation-test-swap-first-20.json").read_text())["records"] == 20
    code, _, _ = run(capsys, monkeypatch, fader, "--tables", "cost", "--device", "cpu")
    assert code == 0 and json.loads(report.read_text()) == content, "one table must not pass for all of them"
    code, _, err = run(capsys, monkeypatch, fader, "--judge", other)
    assert code == 2 and f"error: the judge {other} sees images as image_size 32" in err.splitlines()[-1]


def test_a_judge_of_fewer_pixels_sees_pictures_reduced_and_the_report_says_so(shards, tmp_path, capsys, monkeypatch):
    sizes = {size: {"path": str(shards), **DATA, "image_size": size} for size in (SIZE, 64, 128)}
    small, judge = (make_run(tmp_path / f"judge{size}", JUDGE, data=sizes[size]) for size in (SIZE, 64))
    for size, words in ((64, []), (128, ["sees pictures reduced to 64 pixels"])):
        fader = make_run(tmp_path / f"fader{size}", FADER, data=sizes[size])
        options = ("--tables", "swap,distribution", "--device", "cpu", "--limit", "20", "--judge")
        code, out, err = run(capsys, monkeypatch, fader, *options, judge)
        assert code == 0, err
        assert all(word in out for word in words) and ("reduced" in out) == bool(words)
        code, _, err = run(capsys, monkeypatch, fader, *options, small)
        assert code == 2 and "with the same preprocessing, of 64 " in err.splitlines()[-1], "too few pixels to see a streak"


def test_a_tracked_runs_numbers_and_its_page_go_to_its_mlflow_run(shards, tmp_path, capsys, monkeypatch):
    data = {"path": str(shards), **DATA}
    judge = make_run(tmp_path / "judge", JUDGE, data=data)
    fader = make_run(tmp_path / "fader", FADER, data=data, judge=str(judge))
    words = [fader, "--tables", "swap,fidelity,leak,cost", "--device", "cpu"]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and "MLflow" not in out and not (fader / "spool").exists(), "a run that was not tracked stays so"
    assert not list((fader / "report").glob("*.html")), "a page is drawn when it is asked for"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there: what is spooled can be looked at
    tracker = tracking.MlflowTracker(fader, "experiment", "fader", deliver=False)
    tracker.start()
    tracker.finish("FINISHED")
    monkeypatch.setattr(tracking.later, "sync", refuse)
    code, out, _ = run(capsys, monkeypatch, *words, "--report")
    page = fader / "report" / "report-test.html"
    assert code == 0 and f"wrote {page}" in out and "numbers wait in its spool: nobody there" in out
    events = [json.loads(line) for line in (fader / "spool" / "later.jsonl").read_text().splitlines()]
    assert events[0]["step"] == 3200 and events[0]["metrics"]["test/mse"] > 0
    assert any(event["kind"] == "tags" and "flattered" in event["tags"] for event in events)
    files = {Path(event["path"]).name: event["folder"] for event in events if event["kind"] == "artifact"}
    assert files == dict.fromkeys(("evaluation-test.json", "evaluation-test.md", "report-test.html"), "report")
    code, _, _ = run(capsys, monkeypatch, *words, "--limit", "20")
    assert code == 0 and len((fader / "spool" / "later.jsonl").read_text().splitlines()) == len(events)
    code, _, err = run(capsys, monkeypatch, "models:/x@y", "--report")
    assert code == 2 and "models:/x@y is none: name its run" in err


def test_a_panel_that_nobody_named_is_trained_as_the_shipped_judges_are(shards, tmp_path):
    some = [ATTRIBUTES.names[0]]
    model = registry.load(make_run(tmp_path / "fader", FADER, data={"path": str(shards), **DATA, "attributes": some}))
    shipped = {"residual": "celeba_residual_judge", "official": "celeba_judge"}
    for preset, name in shipped.items():
        theirs = config.load(f"configs/{name}.yaml")
        ours = judges._experiment(preset, model, ShardSet.open(shards), theirs.method.images)
        assert ours.method == dataclasses.replace(theirs.method, asked=tuple(some))
        assert (ours.batch_size, ours.seed, ours.data.augment) == (theirs.batch_size, theirs.seed, theirs.data.augment)
        all_of_them = registry.load(make_run(tmp_path / preset, FADER, data=DATA))
        whole = judges._experiment(preset, all_of_them, ShardSet.open(shards), 128)
        assert not whole.method.asked and whole.folder.name != ours.folder.name


def test_without_judges_a_panel_is_trained_and_kept_for_next_time_by_the_digest_of_its_data(
    shards, tmp_path, capsys, monkeypatch, caplog
):
    data = {"path": str(shards), **DATA}
    fader = make_run(tmp_path / "fader", FADER, data=data, tracking={"enabled": False})
    caplog.set_level("INFO")
    words = [fader, "--judge-images", "128", "--tables", "swap", "--device", "cpu"]
    digest = ShardSet.open(shards).digest[:12]
    model = registry.load(fader)
    experiments = [judges._experiment(preset, model, ShardSet.open(shards), 128) for preset in judges.PANEL]
    kept = [experiment.folder for experiment in experiments]
    assert [folder.name[:-7] for folder in kept] == [f"judge_{digest}_center16_{preset}" for preset in ("residual", "official")]
    kept[0].mkdir()
    with owned(kept[0] / "owner", str(kept[0])):  # as while another evaluation trains it
        code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2 and f"{kept[0]} belongs to process {os.getpid()} on" in err
    assert not list(kept[0].glob("checkpoints/*")), "nothing was written into another's run"
    code, out, _ = run(capsys, monkeypatch, *words)
    for folder in kept:
        assert code == 0 and f"for 128 images and kept in {folder}" in caplog.text
        judge = registry.load(folder)
        assert judge.attributes == ATTRIBUTES and judge.card["images_seen"] == 128
        assert judge.method.settings.is_residual == (folder == kept[0])
        for reader in (folder.name, f"{folder.name}, blurred"):
            assert reader in out, "each reader has a row of its own"
    first = (fader / "report" / "evaluation-test-swap.json").read_text()
    caplog.clear()
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and f"one kept in {kept[0]} judges" in caplog.text and "is trained" not in caplog.text
    assert (fader / "report" / "evaluation-test-swap.json").read_text() == first
    for folder in kept:
        card = json.loads((folder / "run.json").read_text())
        assert card["data_digest"].startswith(digest), "another set in a folder of the same name gets judges of its own"


def test_a_report_is_kept_while_its_judge_has_the_same_weights_and_was_read_as_now(shards, tmp_path, capsys, monkeypatch):
    data = {"path": str(shards), **DATA}
    judge = make_run(tmp_path / "judge", JUDGE, data=data)
    fader = make_run(tmp_path / "fader", FADER, data=data, judge=str(judge))
    specification = Specification(models=(str(fader),), tables=("swap",))
    path = fader / "report" / "evaluation-test-swap.json"

    def kept() -> bool:
        [model] = specification.load()
        return keeping.is_kept(path, model, model.judges, ShardSet.open(shards), specification)

    assert not kept()
    assert run(capsys, monkeypatch, fader, "--tables", "swap", "--device", "cpu")[0] == 0 and kept()
    text = path.read_text()
    for key in ("readers", "judge_digests"):  # as before there was a panel
        path.write_text(json.dumps({name: value for name, value in json.loads(text).items() if name != key}))
        assert not kept()
    path.write_text(text)
    shutil.rmtree(judge)
    make_run(judge, JUDGE, data=data)
    assert kept(), "the same weights again"
    registry.export(judge, tmp_path / "export")
    assert registry.load(tmp_path / "export").digest() == registry.load(judge).digest()
    shutil.rmtree(judge)
    make_run(judge, JUDGE | {"hidden_channels": 12}, data=data)
    assert not kept(), "another judge lies at the same address"


@pytest.mark.parametrize("seed", [7001, 7002])
def test_a_run_with_a_seed_of_the_panel_is_refused_before_a_judge_is_trained(seed, shards, tmp_path, capsys, monkeypatch):
    fader = make_run(tmp_path / "fader", FADER, data={"path": str(shards), **DATA}, seed=seed)
    code, _, err = run(capsys, monkeypatch, fader, "--tables", "swap", "--device", "cpu")
    assert code == 2 and f"{fader} was trained with seed {seed}, which a judge of the panel has" in err
    assert [path.name for path in tmp_path.iterdir()] == ["fader"], "no judge was begun"


def test_one_of_a_runs_checkpoints_is_evaluated_into_files_of_its_own(shards, tmp_path, capsys, monkeypatch):
    data = {"path": str(shards), **DATA}
    judge = make_run(tmp_path / "judge", JUDGE, data=data)
    fader = make_run(tmp_path / "fader", FADER, data=data, judge=str(judge), images=6400)
    newest = checkpoint.latest(fader)
    (older := newest.with_name("images-000000003200")).mkdir()
    for file in newest.iterdir():
        (older / file.name).write_bytes(file.read_bytes())
    for word in (f"{fader}@images-3200", fader):
        code, _, _ = run(capsys, monkeypatch, word, "--tables", "swap", "--device", "cpu")
        assert code == 0
    seen = {path.name: json.loads(path.read_text())["images_seen"] for path in (fader / "report").glob("*.json")}
    assert seen == {"evaluation-test-images-3200-swap.json": 3200, "evaluation-test-swap.json": 6400}
    code, _, err = run(capsys, monkeypatch, fader, "--checkpoint", "best", "--device", "cpu")
    assert code == 2 and "keeps no checkpoint best; there are: images-3200, images-6400, latest" in err


def refuse(_):
    raise ValueError("nobody there")
