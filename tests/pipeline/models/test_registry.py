"""Models for use: what an export holds, what `load` refuses, sliders over planted truth, versions in MLflow."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import config, models
from pipeline.engine import State
from pipeline.models import checkpoint, versions
from pipeline.models.serving import example, signature
from tests.commands import ROOT, environment
from tests.runs import ATTRIBUTES, FADER, JUDGE, make_run, make_store, painter


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "judge", JUDGE)
    make_run(folder / "fader", FADER, judge=str(folder / "judge"))
    return folder


def weights(model: models.Model) -> dict[str, torch.Tensor]:
    return {f"{n}/{k}": v for n, network in model.method.networks.items() for k, v in network.state_dict().items()}


# --- export and load --------------------------------------------------------------------------------------------------


def test_an_aligner_is_exported_and_served_by_its_window(tmp_path):
    """Windows of half the training pictures' side in, four numbers a window out, those of its own `align`."""
    small = {"init_channels": 4, "max_channels": 8, "hidden_channels": 8}
    model = models.load(models.export(make_run(tmp_path / "aligner", {"name": "aligner", **small}), tmp_path / "out"))
    [aligning] = model.capabilities
    assert signature(aligning).inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert example(aligning).shape == (1, 3, 16, 16)
    windows = np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    served = aligning.answer(windows, {})
    off = model.method.align(torch.from_numpy(windows))
    want = torch.stack([off.factor.real, off.factor.imag, off.shift.real, off.shift.imag], 1)
    np.testing.assert_allclose(served, want.numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="does not encode and decode"):
        model.editing  # noqa: B018


def test_an_export_is_the_run_without_its_run(runs, tmp_path):
    run = models.load(runs / "fader")
    export = models.export(runs / "fader", tmp_path / "export")
    model = models.load(export)
    assert weights(model).keys() == weights(run).keys()
    assert all(torch.equal(weights(model)[name], tensor) for name, tensor in weights(run).items())
    assert model.attributes == run.attributes == ATTRIBUTES
    assert model.preprocessing == run.preprocessing
    assert model.method.settings == run.method.settings
    assert model.judges[0].method.name == "judge" and not model.method.networks["encoder"].training
    files = sorted(str(path.relative_to(export)) for path in export.rglob("*") if path.is_file())
    assert files == ["card.json", "judge/card.json", "judge/model.safetensors", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "a temporary folder was left"


def test_an_export_holds_what_use_needs_and_one_from_before_is_read(runs, tmp_path):
    """Nothing of discriminators, nor of the critic, which keeps sums over training pictures."""
    critic = {"solved": {"weight": 1, "num_hidden": 8, "steps": 1}}
    export = models.export(make_run(tmp_path / "run", FADER | critic), tmp_path / "out")
    path, card = export / "model.safetensors", json.loads((export / "card.json").read_text())
    held = load_file(path)
    assert {name.partition("/")[0] for name in held} == set(card["networks"]) == {"encoder", "decoder"}

    def changed(tensors: dict[str, torch.Tensor], number: int) -> None:
        save_file(tensors, path)
        told = card | {"format": number, "weights_digest": hashlib.sha256(path.read_bytes()).hexdigest()}
        (export / "card.json").write_text(json.dumps(told))

    changed(held | {"latent_discriminator/weight": torch.ones(3)}, 1)
    model = models.load(export)
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights(model).items())
    changed({name: tensor for name, tensor in held.items() if name.startswith("encoder")}, 2)
    with pytest.raises(ValueError, match="holds the networks encoder; its method has decoder, too"):
        models.load(export)


def test_the_card_says_what_the_weights_are(runs, tmp_path):
    card = json.loads((models.export(runs / "fader", tmp_path / "export") / "card.json").read_text())
    experiment = config.load(runs / "fader" / "config.yaml")
    assert card["method"] == "fader" and card["settings"]["init_channels"] == 4
    assert card["images_seen"] == 3200 and card["image_size"] == 32 and card["ema"] is False
    assert card["config_digest"] == experiment.digest and card["config"] == experiment.to_dict()
    assert card["data_digest"] == "d" * 64 and card["commit"] == "c0ffee"
    assert card["packages"]["torch"] == torch.__version__ and "CelebA is for non-commercial research" in card["licence"]
    assert card["intended_use"] == ["research on editing attributes: photos of people who agreed to it, shown as edited"]
    assert card["limits"] == [
        "it reads pictures of 32x32 pixels, cut by the rule 'celeba'",
        "it was not evaluated: no number says how well it works",
    ]


def test_the_card_says_which_data_its_terms_and_how_far_the_numbers_reach(tmp_path):
    run = make_run(tmp_path / "run", FADER)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"data": {"name": "faces", "records": {"train": 3200, "test": 400}}}))
    report = {
        "metrics": {"test/mse": 0.25, "test/swap_accuracy": 0.9},
        "intervals": {"test/swap_accuracy": [0.85, 0.94]},
        "warnings": ["100 of the 400 records of the test split"],
    }
    (run / "report").mkdir()
    (run / "report" / "evaluation-test.json").write_text(json.dumps(report))
    model = models.load(models.export(run, tmp_path / "export"))
    assert (model.card["metrics"], model.card["intervals"]) == (report["metrics"], report["intervals"])
    assert "(faces). The faces are drawn by this project" in model.card["licence"]
    assert model.card["limits"][1:] == ["it was trained on 3,200 pictures of faces; others may do worse", *report["warnings"]]
    words = versions._describe(model)
    assert "test/swap_accuracy: 0.9 (0.85 to 0.94)" in words and "test/mse: 0.25\n" in words
    assert "Meant for research" in words and "Note: 100 of the 400 records" in words


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    run = make_run(tmp_path / "run", FADER)
    stored = checkpoint.read_networks(checkpoint.latest(run))
    networks = {f"{n}/{k}": v for n, state in stored.items() for k, v in state.items()}
    averaged = {name: torch.zeros_like(v) for name, v in networks.items() if name.startswith("encoder/")}
    checkpoint.write(run, 6400, State(networks, averaged, {}), {})
    model = models.load(run)
    assert model.card["ema"] and all(v.eq(0).all() for n, v in weights(model).items() if n.startswith("encoder/"))
    assert models.load(run, ema=False).card["ema"] is False
    export = models.export(run, tmp_path / "export")
    with pytest.raises(ValueError, match="averaged weights only"):
        models.load(export, ema=False)


def test_numbers_of_an_older_checkpoint_are_not_put_on_the_card(tmp_path):
    run = make_run(tmp_path / "run", FADER)
    report = run / "report" / "evaluation-test.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"metrics": {"test/swap_accuracy": 0.9}}))
    assert models.load(run).card["metrics"] == {"test/swap_accuracy": 0.9}
    os.utime(report, (1, 1))
    assert models.load(run).card["metrics"] == {}


def test_an_export_that_stands_is_replaced_and_anything_else_is_not(runs, tmp_path):
    out = models.export(runs / "fader", tmp_path / "export")
    (out / "stale").write_text("x")
    assert not (models.export(runs / "judge", out) / "stale").exists()
    assert models.load(out).method.name == "judge"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is no export"):
        models.export(runs / "fader", tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_what_cannot_be_loaded_says_why(runs, tmp_path):
    def refused(source, match, **how):
        with pytest.raises(ValueError, match=match):
            models.load(source, **how)

    refused(tmp_path / "nothing", "no such folder; give a run")
    refused(tmp_path, "neither a run")
    young = make_run(tmp_path / "young", FADER)
    for path in (young / "checkpoints").glob("*/networks.safetensors"):
        path.write_bytes(b"damaged")
    refused(young, "no sound checkpoint")

    export = models.export(runs / "fader", tmp_path / "export")
    card = (export / "card.json").read_text()
    data = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(export, "does not match the digest")
    (export / "model.safetensors").write_bytes(data)
    for change, match in [
        ({"format": 99}, "upgrade"),
        ({"method": "vqgan"}, "unknown method 'vqgan'"),
        ({"settings": {"wings": 2}}, "unknown key method.wings.*upgrade"),
        ({"channels": 1}, "does not take these weights"),
    ]:
        (export / "card.json").write_text(json.dumps(json.loads(card) | change))
        refused(export, match)
    (export / "card.json").write_text(card[: len(card) // 2])
    refused(export, "damaged")


def test_a_judge_that_does_not_fit_is_refused(runs, tmp_path):
    other = make_run(tmp_path / "other", JUDGE, data={"image_size": 64})
    with pytest.raises(ValueError, match="same preprocessing"):
        models.export(runs / "fader", tmp_path / "export", judge=other)
    with pytest.raises(ValueError, match="not a judge"):
        models.export(runs / "fader", tmp_path / "export", judge=runs / "fader")
    assert not (tmp_path / "export").exists()


def test_a_judge_that_is_gone_is_said_and_done_without(tmp_path, caplog):
    run = make_run(tmp_path / "run", FADER, judge="runs/gone")
    assert models.load(run).judges == ()
    assert "runs/gone, which is not here" in caplog.text


# --- sliders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """The painter, judged by itself."""
    with painter() as method:
        make_run(tmp_path / "judge", method)
        yield models.load(make_run(tmp_path / "painter", method, judge=str(tmp_path / "judge")))


def pictures(*labels: tuple[int, int, int]) -> torch.Tensor:
    """Pictures that the painter would paint for these labels."""
    code = ATTRIBUTES.code(torch.tensor(labels, dtype=torch.float32))
    colours = code[:, [1, 3, 6]] * 2 - 1
    return colours[:, :, None, None].expand(-1, -1, 32, 32).contiguous()


def test_sliders_stand_at_minus_one_and_one_where_the_labels_stand(model):
    images = pictures((0, 1, 0))
    labels, _ = model.editing.labels(images)
    settings = [[model.editing.slider("Smiling", value)] for value in ("-1", "0", "1", "2")]
    red = model.editing.edit(images, labels, [[], *settings])[0, :, 0, 0, 0]
    assert red.tolist() == [-1, -1, 0, 1, 1], "absent, midway, present, and clamped beyond"
    green = model.editing.edit(images, labels, settings)[0, :, 1, 0, 0]
    assert green.tolist() == [1, 1, 1, 1], "the attribute that nobody moved"


def test_a_value_of_many_can_be_named_either_way(model):
    images = pictures((0, 0, 0), (1, 1, 1))
    labels, _ = model.editing.labels(images)
    slider = model.editing.slider
    by_name, by_slider = slider("Beard", "full"), slider("Beard.full", "1")
    assert by_name == by_slider == models.Slider("Beard", 2, 1.0)
    assert model.editing.edit(images, labels, [[by_name]])[:, 0, 2, 0, 0].tolist() == [1, 1]
    assert model.editing.edit(images, labels, [[slider("Beard", "moustache")]])[:, 0, 2, 0, 0].tolist() == [-1, -1]


def test_a_picture_is_edited_in_three_lines_of_python(model):
    """The painter's own Smiling is kept, Eyeglasses and the full Beard are moved; any size and mode goes in."""
    edited = model.edit(Image.new("L", (300, 200), 255), Eyeglasses=0, Beard="full")
    assert edited.size == (32, 32) and edited.getpixel((9, 9)) == (255, 128, 255)
    with pytest.raises(ValueError, match="did you mean 'Smiling'"):
        model.edit(Image.new("RGB", (178, 218)), Smilling=1)


def test_own_labels_are_given_or_judged_or_estimated(model):
    truth = [(0, 1, 0), (1, 0, 2), (1, 1, 0)]
    images = pictures(*truth)
    labels, how = model.editing.labels(images)
    assert labels.tolist() == [list(row) for row in truth] and set(how.values()) == {"judge"}
    labels, how = model.editing.labels(images, {"Smiling": 0.0})
    assert labels[:, 0].tolist() == [0, 0, 0] and how == {"Smiling": "given", "Eyeglasses": "judge", "Beard": "judge"}
    model.judges = ()
    labels, how = model.editing.labels(images, {"Eyeglasses": 1.0})
    assert how == {"Smiling": "estimated", "Eyeglasses": "given", "Beard": "estimated"}
    assert labels[:, 0].tolist() == [0, 1, 1] and labels[:, 2].tolist() == [0, 2, 0]


def test_sliders_that_make_no_sense_are_refused(model):
    for name, value, match in [
        ("Smilling", "1", "did you mean 'Smiling'"),
        ("Smiling", "much", "not a number; -1 is absent"),
        ("Smiling", "inf", "not a finite number"),
        ("Smiling.full", "1", "without .full"),
        ("Beard", "1", "Beard is one of none, moustache, full"),
        ("Beard.goatee", "1", "has no value 'goatee'"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.editing.slider(name, value)
    for name, value, match in [("Smiling", "-1", "is 0 or 1"), ("Beard", "3", "is none, moustache, full")]:
        with pytest.raises(ValueError, match=match):
            model.editing.label(name, value)
    label = model.editing.label
    assert (label("Beard", "full"), label("Beard", "1"), label("Smiling", "1")) == (2, 1, 1)


def test_pictures_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"takes \['N', 3, 32, 32\], not \[1, 3, 64, 64\]"):
        model.editing.labels(torch.zeros(1, 3, 64, 64))


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(runs, tmp_path_factory):
    """A tracked run and its judge, registered in a store of their own; (store folder, version of the fader)."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", make_store(folder))
        client = MlflowClient()
        run_id = client.create_run(client.create_experiment("fader", str(folder / "artifacts"))).info.run_id
        (runs / "fader" / "report").mkdir(exist_ok=True)
        (runs / "fader" / "report" / "evaluation-test.json").write_text('{"metrics": {"test/swap_accuracy": 0.875}}')
        spool = runs / "fader" / "spool"
        spool.mkdir(exist_ok=True)
        targets = {f"sqlite:///{folder}/mlflow.db": {"run_id": run_id}}
        (spool / "state.json").write_text(json.dumps({"last": None, "targets": targets, "problem": None}))
        version = models.register(runs / "fader", "faces")
        models.register(runs / "judge", "judge_of_faces")
        assert version.run_id == run_id
        yield folder, version


def test_a_registered_version_answers_in_a_clean_process(registered, tmp_path, runs):
    """In another folder, with the address of the store, the packages that the model asks for, and its own copy of our code."""
    folder, version = registered
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    script = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"accelerate", "deepspeed", "nvidia", "webdataset", "typer", "cv2", "launch"}:
            raise ImportError(name + " is not among the model's requirements")

sys.meta_path.insert(0, Refuse())
import mlflow, numpy
images = numpy.load("images.npy")
model = mlflow.pyfunc.load_model("models:/faces@challenger")
sliders = json.dumps({"Smiling": 1.5, "Beard": "full"})
numpy.save("edited.npy", model.predict(images, params={"sliders": sliders}))
numpy.save("same.npy", model.predict(images))
numpy.save("judged.npy", mlflow.pyfunc.load_model("models:/judge_of_faces@challenger").predict(images))
try:
    model.predict(images[:, :, :16])
except mlflow.exceptions.MlflowException as error:
    print("refused", error)
import fader, pipeline
print("code", fader.__file__, pipeline.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env=environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db", MLFLOW_DISABLE_TELEMETRY="true"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout, "pictures of another shape were taken"
    ours = [Path(word) for word in done.stdout[done.stdout.index("code") :].split()[1:]]
    assert len(ours) == 2 and not any(path.is_relative_to(ROOT) for path in ours), "it ran the code that lies here"
    model = models.load(runs / "fader")
    own, _ = model.editing.labels(torch.from_numpy(images))
    sliders = [model.editing.slider("Smiling", 1.5), model.editing.slider("Beard", "full")]
    both = model.editing.edit(torch.from_numpy(images), own, [[], sliders])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "same.npy")), both[:, 0])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "edited.npy")), both[:, 1])
    judged = np.load(tmp_path / "judged.npy")
    assert judged.shape == (2, ATTRIBUTES.code_width)
    np.testing.assert_allclose(judged[:, 4:].sum(1), 1, rtol=1e-5)


def test_a_version_is_linked_tagged_and_never_pickled(registered):
    from mlflow import MlflowClient

    folder, version = registered
    found = MlflowClient().get_model_version_by_alias("faces", "challenger")
    assert (int(found.version), found.run_id) == (version.version, version.run_id)
    assert found.tags["data_digest"] == "d" * 64 and found.tags["attributes"] == "Smiling, Eyeglasses, Beard"
    outputs = MlflowClient().get_run(version.run_id).outputs.model_outputs
    assert len(outputs) == 1, "the run's page shows no model"
    assert found.tags["metric.test/swap_accuracy"] == "0.875"
    [metric] = MlflowClient().get_logged_model(outputs[0].model_id).metrics
    assert (metric.key, metric.value, metric.step) == ("test/swap_accuracy", 0.875, 3200)
    files = [path.name for path in (folder / "artifacts").rglob("*") if path.is_file()]
    assert "model.safetensors" in files and "MLmodel" in files and "input_example.json" in files
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".pth", ".bin"))]


def test_a_version_loads_as_a_model(registered, runs):
    model = models.load("models:/faces@challenger")
    assert all(torch.equal(weights(model)[n], v) for n, v in weights(models.load(runs / "fader")).items())
    assert model.card["registered"] == {"name": "faces", "version": 1}
    assert len(model.judges) == 1 and models.load("models:/faces/1").source == "models:/faces/1"
    judging = models.load("models:/judge_of_faces@challenger").judging
    assert [block.shape for block in judging.probabilities(torch.zeros(1, 3, 32, 32))] == [(1, 2), (1, 2), (1, 3)]


def test_registering_again_makes_the_next_version_and_moves_the_alias(registered, runs):
    assert models.register(runs / "judge", "judge_of_faces").version == 2
    assert models.load("models:/judge_of_faces@challenger").card["registered"]["version"] == 2


def test_a_version_that_another_tool_registered_is_refused_in_a_line(registered, tmp_path):
    import mlflow

    code = tmp_path / "echo.py"
    code.write_text(
        "import mlflow\n\n\nclass Echo(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n        return model_input\n\n\nmlflow.models.set_model(Echo())\n"
    )
    client = mlflow.MlflowClient()
    with mlflow.start_run(experiment_id=client.create_experiment("other", str(tmp_path / "artifacts"))):
        mlflow.pyfunc.log_model(name="echo", python_model=str(code), registered_model_name="echo", pip_requirements=[])
    with pytest.raises(ValueError, match="holds no export .* was not registered by 'fader register'"):
        models.load("models:/echo/1")
    client.delete_registered_model("echo")


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("models:/facs@challenger", "no model 'facs' is registered .*there are: faces, judge_of_faces"),
        ("models:/faces@champion", "has @challenger .version 1., versions up to 1"),
        ("models:/faces/9", "versions up to 1"),
        ("models:/faces", "write models:/NAME@ALIAS"),
    ],
)
def test_an_address_that_leads_nowhere_lists_what_there_is(registered, address, match):
    with pytest.raises(ValueError, match=match):
        models.load(address)


def test_without_a_store_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="no MLflow store here"):
        models.load("models:/faces@challenger")
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_gone_is_an_error_within_seconds(runs, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match="MLflow at http://127.0.0.1:9: connection refused"):
        models.load("models:/faces@challenger")


def test_a_name_that_mlflow_would_not_take_is_refused_before_any_work(runs):
    with pytest.raises(ValueError, match="cannot name a registered model"):
        models.register(runs / "fader", "a/b")
