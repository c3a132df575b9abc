"""A method that samples and does not encode goes the whole way: trained, validated, evaluated, exported, registered, served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.data.shards import ShardSet
from pipeline.models import checkpoint
from tests.runs import JUDGE, make_run, make_store
from tests.shams import Drawing, registered
from tests.warm import forked


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose generator paints Smiling red, Eyeglasses green and a full Beard blue."""
    with registered(Drawing):
        yield make_run(tmp_path / "drawing", {"name": "sham_drawing"})


def test_a_seed_means_one_picture_whatever_else_is_asked(run):
    sampling = models.load(run).sampling
    seeds = torch.tensor([3, 5, 7])
    together = sampling.sample(seeds)
    assert together.shape == (3, 3, 32, 32)
    torch.testing.assert_close(sampling.sample(seeds[1:2]), together[1:2])
    assert len(set(map(tuple, together[:, :, 0, 0].tolist()))) == 3
    smiling = sampling.sample(seeds, {"Smiling": 1.0})
    torch.testing.assert_close(sampling.sample(seeds, {}, [sampling.slider("Smiling", 1)]), smiling)
    assert not torch.equal(smiling, sampling.sample(seeds, {"Smiling": 0.0}))


def test_noise_goes_from_seed_to_seed_and_is_cut_where_it_is_told(run, monkeypatch):
    """The ends are the two seeds' own; in between it is as long as noise is; cut noise is the normal law within bounds."""
    sampling, noises = models.load(run).sampling, []
    monkeypatch.setattr(sampling.method, "noise_width", 5_000, raising=False)
    monkeypatch.setattr(sampling.method, "sample", lambda noise, code: noises.append((noise, code)) or noise[:, :1, None, None])
    sampling.sample(torch.tensor([3, 9]))
    sampling.sample(torch.full((5,), 3), to=9)
    (own, _), (between, codes) = noises
    torch.testing.assert_close(between[[0, 4]], own, rtol=1e-5, atol=1e-5)
    assert (between.square().mean(1).sqrt() - 1).abs().max() < 0.05 and (codes == codes[0]).all()
    sampling.sample(torch.tensor([3, 9]), truncation=0.7)
    cut = noises[-1][0]
    assert cut.abs().max() <= 0.7 and torch.equal(cut.flatten().argsort(), own.flatten().argsort())
    normal = torch.distributions.Normal(0.0, 1.0)
    inside = (normal.cdf(torch.tensor(0.3)) - 0.5) / (normal.cdf(torch.tensor(0.7)) - 0.5)
    assert (cut.abs() < 0.3).float().mean().item() == pytest.approx(float(inside), abs=0.02)
    sampling.sample(torch.tensor([3, 9]), truncation=20.0)
    torch.testing.assert_close(noises[-1][0], own)


def test_what_is_not_set_is_drawn_from_records_that_occur(run, tmp_path):
    """Together, from those nearest to what is asked for; an export keeps them; only= makes the rest absent."""
    about = json.loads((run / "run.json").read_text())
    occurring = {"0 0 0": 3, "1 1 2": 1, "1 0 1": 1}
    about["labels"] = [row for row, times in occurring.items() for _ in range(times)]
    (run / "run.json").write_text(json.dumps(about))
    names = ("Smiling", "Eyeglasses", "Beard")
    for source in (run, models.export(run, tmp_path / "export")):
        sampling, seeds = models.load(source).sampling, torch.arange(400)

        def shares(rows: list[str], *, only: bool = False, **asked: float) -> list[float]:
            """The share of pictures that show each row's labels."""
            made = sampling.sample(seeds, asked, only=only)
            given = [sampling.sample(seeds, dict(zip(names, map(float, row.split())))) for row in rows]
            return [float((made == each).flatten(1).all(1).double().mean()) for each in given]

        assert shares(list(occurring)) == pytest.approx([0.6, 0.2, 0.2], abs=0.08)
        assert shares(list(occurring), Smiling=1.0) == pytest.approx([0, 0.5, 0.5], abs=0.1)
        assert shares(["1 1 2"], Smiling=1.0, Eyeglasses=1.0) == [1.0]
        assert shares(["0 1 0", "0 1 2"], Smiling=0.0, Eyeglasses=1.0)[0] > 0.5, "no record is asked for: the nearest"
        assert shares(["0 1 0"], only=True, Eyeglasses=1.0) == [1.0]
        beard = sampling.sample(seeds, sliders=[sampling.slider("Beard", "full")])
        assert torch.equal(beard, sampling.sample(seeds, {"Smiling": 1.0, "Eyeglasses": 1.0, "Beard": 2.0}))


def test_it_is_exported_registered_served_and_loaded(run, tmp_path, monkeypatch):
    """Only the generator goes into the export; the service takes seeds and answers as the run does."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_store(tmp_path))
    monkeypatch.chdir(tmp_path)
    version = models.register(run, "drawing")
    assert set(models.load(version.export).method.networks) == {"generator"}
    loaded = models.load(version.address)
    assert [type(can).__name__ for can in loaded.capabilities] == ["Sampling"]
    with pytest.raises(ValueError, match="does not encode and decode; it has no sliders to move"):
        loaded.editing  # noqa: B018
    served = mlflow.pyfunc.load_model(version.address)
    params = {"sliders": '{"Smiling": 2}', "attributes": '{"Beard": "full"}'}
    answer = served.predict(np.array([4, 9]), params=params)
    sampling = models.load(run).sampling
    want = sampling.sample(torch.tensor([4, 9]), {"Beard": 2.0}, [sampling.slider("Smiling", 2)])
    np.testing.assert_allclose(answer, want.numpy(), rtol=1e-6)
    assert answer.dtype == np.float32
    with pytest.raises(mlflow.exceptions.MlflowException, match="int64"):
        served.predict(np.zeros((1, 3, 32, 32), np.float32))
    assert "attributes of what it samples: Smiling, Eyeglasses, Beard" in _description(version)


def _description(version: models.Version) -> str:
    from mlflow import MlflowClient

    return MlflowClient().get_model_version(version.name, str(version.version)).description


CONFIG = """
name: drawing
method: {name: sham_drawing, images: 640}
data: {path: FACES, attributes: [Smiling, Blond_Hair], image_size: 32, threads: 1}
batch_size: 16
judge: [judge, other]
run: {folder: drawing, log_images: 160, checkpoint_images: 320, picture_images: 320, evaluate_images: 320, evaluate_records: 20}
"""


def test_the_commands_take_it_from_tars_to_a_champion(faces, tmp_path):
    """Trained with validation and pictures, evaluated with its page, registered, sampled from, promoted; not edited with."""
    data = {"path": str(faces), "attributes": ["Smiling", "Blond_Hair"]}
    other = {"name": "judge", "preset": "small_residual", "init_channels": 4, "max_channels": 8}
    for name, method in (("judge", JUDGE), ("other", other)):
        make_run(tmp_path / name, method, data=data, attributes=ShardSet.open(faces).attributes)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("FACES", str(faces)))
    here = {"cwd": tmp_path, "MLFLOW_TRACKING_URI": make_store(tmp_path)}
    run, address = tmp_path / "drawing", "models:/drawing@challenger"

    forked("tests.with_shams", "train", "config.yaml", **here)
    measured = json.loads((checkpoint.latest(run) / "state.json").read_text())["metrics"]
    assert {"sample_accuracy.Smiling", "swap_accuracy.Blond_Hair"} <= measured.keys() and "mse" not in measured
    assert len(list((run / "spool" / "pictures").glob("sliders-*.png"))) == 2

    said = forked("tests.with_shams", "evaluate", "drawing", "--report", "--device", "cpu", **here).stdout
    assert said.splitlines()[-1] == "next: fader register drawing --name NAME"
    assert (run / "report" / "report-test" / "sweep-Smiling.png").is_file()

    said = forked("tests.with_shams", "register", "drawing", "--name", "drawing", **here).stdout
    assert said.splitlines()[-1] == f"next: fader sample {address} --set Smiling=1.5 --out DIR"
    forked("tests.with_shams", "sample", address, "--set", "Smiling=1.5", "--count", "2", "--out", "out", **here)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid.png", "seed-0.png", "seed-1.png"]
    said = forked("tests.with_shams", "promote", "drawing", "--min", "smiling.swap=0", "--device", "cpu", **here).stdout
    assert "drawing@champion is version 1 now" in said
    words = ["edit", tmp_path / "out" / "grid.png", "--model", address, "--set", "Smiling=1", "--out", "no"]
    refused = forked("tests.with_shams", *words, code=2, **here).stderr
    assert "sham_drawing does not encode and decode; it has no sliders to move" in refused
