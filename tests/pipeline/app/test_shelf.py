"""Other models on the page, runs that are watched while they train, their reports, and the study."""

from __future__ import annotations

import csv
import io
import json
import random
import urllib.error
import urllib.request

import numpy as np
import pytest

from launch.study import study as study_command
from pipeline import models
from pipeline.app import server
from pipeline.app.shelf import Opened, Shelf, opened
from pipeline.app.study import KINDS, TRIALS, Study, read_answers
from pipeline.data.shards import ShardSet
from pipeline.images import png_bytes
from pipeline.metrics import wilson
from tests.launch.conftest import call  # noqa: F401
from tests.page import painted, person, photo, pixels, serving
from tests.runs import FADER, JUDGE, make_run, make_store


def spool(run, *events):
    """Append events to a run's spool as the loop does."""
    (run / "spool" / "pictures").mkdir(parents=True, exist_ok=True)
    with (run / "spool" / "main.jsonl").open("a") as file:
        for number, event in enumerate(events):
            file.write(json.dumps({"kind": "metrics", "time": number, "updates": 1} | event) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/: fader with two checkpoints and a report, judge; a store with a version of it, and a folder beside it."""
    folder = tmp_path_factory.mktemp("shelf")
    run = make_run(folder / "runs" / "fader", FADER)
    make_run(folder / "more", FADER, images=1600)
    (folder / "more/checkpoints/images-000000001600").rename(run / "checkpoints/images-000000001600")
    make_run(folder / "runs" / "judge", JUDGE)
    (run / "report").mkdir()
    (run / "report" / "report-test.html").write_text("<h1>slides</h1>")
    (folder / "secret").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", make_store(folder))
        patch.chdir(folder)
        models.register(run, "faces")
        yield folder / "runs"


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    with painted(tmp_path_factory.mktemp("page")) as model:
        with serving(server.Service(Shelf(Opened(model, model.editing), runs))) as address:
            yield address


def test_versions_runs_and_checkpoints_are_listed_and_opened(address, runs):
    with person(address) as one:
        said, _ = one.ask({"kind": "models"})
        assert said["groups"]["registry"] == ["models:/faces@challenger", "models:/faces/1"]
        assert said["groups"]["runs"] == [f"{runs}/fader", f"{runs}/fader@images-1600", f"{runs}/judge"]
        assert said["runs"] == [{"name": "fader", "report": True}, {"name": "judge", "report": False}]
        one.give(photo((255, 0, 0)))
        for choice in ("models:/faces@challenger", f"{runs}/fader@images-1600"):
            about, _ = one.ask({"kind": "pick", "address": choice})
            assert about["kind"] == "model" and about["model"] == choice and about["upload_bytes"]
            assert "there is no photo yet" in one.ask({"kind": "move", "number": 1, "sliders": {}})[0]["text"]
            assert one.give(photo())["kind"] == "face" and one.move(Smiling=1).shape == (32, 32, 3)
        for wrong, why in ((f"{runs}/judge", "has no sliders"), ("/etc", "is none of the models here"), (f"{runs}/../secret", "none")):
            assert why in one.ask({"kind": "pick", "address": wrong})[0]["text"]
        assert one.move(Smiling=0).shape == (32, 32, 3), "the model before is still there"
        with person(address) as other:
            assert other.model["model"].endswith("painter"), "another person keeps theirs"


def test_a_run_that_trains_is_followed(address, runs):
    run = runs / "fader"
    spool(run, {"kind": "start", "step": 0, "from": 0})
    spool(run, *({"step": 100 * k, "metrics": {"autoencoder/mse": 1 / k, "latent/weight": k / 900}} for k in range(1, 901)))
    with person(address) as one:
        said, _ = one.ask({"kind": "watch", "run": "fader", "size": 0})
        curve = said["curves"]["autoencoder/mse"]
        assert set(said["curves"]) == {"autoencoder/mse", "latent/weight"} and "picture" not in said
        assert len(curve) <= 301 and curve[0] == [100, 1.0] and curve[-1] == [90_000, 1 / 900]
        same, _ = one.ask({"kind": "watch", "run": "fader", "size": said["size"]})
        assert same == {"kind": "training", "run": "fader", "size": said["size"]}, "nothing new is sent twice"
        spool(run, {"kind": "start", "step": 90_000, "from": 90_000}, {"step": 90_100, "metrics": {"autoencoder/mse": float("nan")}})
        spool(run, {"step": 90_200, "metrics": {"autoencoder/mse": 0.5}})
        (run / "spool/pictures/sliders-000090200-ab.png").write_bytes(png_bytes(np.zeros((4, 4, 3), np.uint8)))
        said, _ = one.ask({"kind": "watch", "run": "fader", "size": said["size"]})
        assert said["curves"]["autoencoder/mse"][-1] == [90_200, 0.5] and said["caption"] == "sliders-000090200"
        for wrong in ("judge", "..", "gone"):
            assert one.ask({"kind": "watch", "run": wrong, "size": 0})[0]["kind"] == "error"


def test_a_report_is_read_by_whom_the_page_may_speak_with(address, runs):
    with urllib.request.urlopen(f"http://{address}/report/fader", timeout=60) as got:
        assert got.read() == b"<h1>slides</h1>" and "script-src" not in got.headers["Content-Security-Policy"]
    request = urllib.request.Request(f"http://{address}/report/fader", headers={"Host": "evil.example"})
    for wrong in (request, f"http://{address}/report/judge", f"http://{address}/report/..%2f..%2fsecret"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(wrong, timeout=60)
    guarded = server.Service(Shelf(opened(f"{runs}/fader"), runs), token="t")
    assert guarded.trusts("anywhere:80", "t") and not guarded.trusts("localhost", None)


def test_few_models_stay_in_memory(runs, monkeypatch):
    shelf = Shelf(opened(f"{runs}/fader"), runs)
    monkeypatch.setattr("pipeline.app.shelf.MOST_OPEN", 1)
    other = shelf.open("models:/faces/1")
    assert shelf.open("models:/faces/1") is other and list(shelf._open) == ["models:/faces/1"]
    assert shelf.open(f"{runs}/fader") is shelf.first


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, faces):
    shards = ShardSet.open(faces)
    data = {"path": str(faces), "attributes": ["Smiling", "Eyeglasses"]}
    run = make_run(tmp_path / "run", FADER, attributes=shards.attributes, data=data)
    model = models.load(run)
    return Study(model, model.editing, shards.split("train"), tmp_path / "answers.csv")


def test_a_study_is_blind_and_keeps_what_is_said(study, call, tmp_path):  # noqa: F811
    """A rater who always says natural, and what the file knows to be right, and another who never does."""
    service = server.Service(Shelf(Opened(study.model, study.editing)), study=study)
    with serving(service) as address:
        for natural in (True, False):
            with person(address) as one:
                assert one.model == {"kind": "study", "trials": TRIALS, "upload_bytes": service.limits.upload_bytes}
                assert "takes nothing else" in one.give(photo())["text"] and "rate" in one.ask({"kind": "models"})[0]["text"]
                head, picture = one.ask({"kind": "next"})
                assert one.ask({"kind": "next"})[1] == picture, "an unrated picture stays"
                assert "there is no number 3" in one.ask({"kind": "rated", "natural": True, "value": 2})[0]["text"]
                for left in reversed(range(TRIALS)):
                    assert set(head) == {"kind", "attribute", "values", "left"} and head["left"] == left
                    assert head["values"] == ["absent", "present"] and pixels(picture).shape == (32, 32, 3)
                    head, picture = one.ask({"kind": "rated", "natural": natural, "value": 1})
                assert head == {"kind": "done"}
    rows = read_answers(study.answers)
    assert len(rows) == 2 * TRIALS and len({row["rater"] for row in rows}) == 2
    assert [sum(row["kind"] == kind for row in rows) for kind in KINDS] == [2 * TRIALS // 3] * 3
    assert [row["kind"] for row in rows] != sorted(row["kind"] for row in rows)
    code, said, _ = call(study_command, str(study.answers))
    count = 2 * TRIALS // 3
    right = sum(row["value"] == "1" for row in rows if row["kind"] == "swap")
    low, high = wilson(right, count)
    assert code == 0 and f"{2 * TRIALS} answers of 2 people" in said and said.count("50.0% (") >= 3
    assert f"{right / count:.1%} ({low:.1%} to {high:.1%})" in next(line for line in said.splitlines() if line.startswith("swap"))


def test_what_is_shown_is_what_the_file_says(study):
    """A real picture is the record's; a swap is decoded with the value that the file names."""
    labels = dict(zip(study.split.keys, study.labels))
    for kind in KINDS:
        known, png = study.trial(kind, random.Random(1))
        own = str(int(labels[known["key"]][study.model.attributes.index(known["attribute"])]))
        assert (known["value"] == own) == (kind != "swap") and pixels(png).shape == (32, 32, 3)
    pictures = {kind: pixels(study.trial(kind, random.Random(1))[1]) for kind in KINDS}
    assert (pictures["real"] != pictures["reconstruction"]).any() and (pictures["swap"] != pictures["reconstruction"]).any()


def test_a_file_of_something_else_is_not_taken(study, call, tmp_path):  # noqa: F811
    study.answers.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="does not hold a study's answers"):
        Study(study.model, study.editing, study.split, study.answers)
    empty = io.StringIO()
    csv.writer(empty).writerow(["time", "rater", "model", "key", "kind", "attribute", "value", "natural", "answer"])
    study.answers.write_text(empty.getvalue())
    assert "holds no answer yet" in call(study_command, str(study.answers))[2]
    assert "No such file" in call(study_command, str(tmp_path / "gone.csv"))[2]


def test_wilsons_interval_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wikipedia's formula, by hand
    assert wilson(0, 10)[0] == 0 and wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
