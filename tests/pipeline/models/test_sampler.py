"""A method that samples and does not encode goes the whole way: trained, validated, evaluated, exported, registered, served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import models
from tests.runs import make_run, make_store
from tests.shams import Drawing, registered


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
