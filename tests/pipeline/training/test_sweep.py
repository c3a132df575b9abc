"""A grid's children, and which of them is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.shards import ShardSet
from pipeline.evaluation.compare import Compared
from pipeline.training import sweep
from tests.runs import make_run

CONFIG = """
name: base
method: {name: fader, preset: small}
data: {path: d, attributes: [Smiling], image_size: 64}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "base.yaml").write_text(CONFIG)
    return tmp_path / "base.yaml"


def test_a_grid_is_every_combination_with_a_folder_each(config):
    words = ["method.latent.weight=0,1e-3,0.01", "seed=0,1", "batch_size=16"]
    asked = sweep.plan(config, words, Path("out"))
    assert [child.number for child in asked.children] == list(range(6)) and len(asked.axes) == 2
    third = asked.children[3]
    assert (third.experiment.method.latent.weight, third.experiment.seed, third.experiment.batch_size) == (1e-3, 1, 16)
    assert str(third.folder) == "out/latent.weight-1e-3--seed-1" and third.experiment.name == "base latent.weight-1e-3--seed-1"
    assert len({child.folder for child in asked.children}) == 6
    assert sweep.plan(config, words).folder == Path("runs/base_sweep")
    nested = sweep.with_parent(third, "abc")
    assert nested.tracking.parent == "abc" and nested.digest == third.experiment.digest


def test_lists_keep_their_commas(config):
    asked = sweep.plan(config, ["data.attributes=[Smiling],[Male,Young]", "method.betas=[0.5,0.999]"])
    assert [child.experiment.data.attributes for child in asked.children] == [("Smiling",), ("Male", "Young")]
    assert [child.label for child in asked.children] == ["attributes-Smiling", "attributes-Male_Young"]


def test_sets_may_be_swept(config):
    assert [child.experiment.data.path for child in sweep.plan(config, ["data.path=a,b"]).children] == ["a", "b"]


def test_keys_that_end_alike_are_told_apart():
    label = sweep._label({"method.images": "1", "other.images": "2"})
    assert label == "method.images-1--other.images-2"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=1"], "nothing is swept"),
        (["seed=1,2", "seed=3"], "seed stands twice"),
        (["seed"], "is not a setting"),
        (["seed=1,,2"], "a value is empty"),
        (["method.latent.wieght=1,2"], "did you mean method.latent.weight?"),
        (["method.latent.weight=1e-3,0.001"], "are the same experiment"),
        (["run.log_images=1,2"], "are the same experiment"),
        (["data.threads=1,2"], "are the same experiment"),
        (["name=a,b"], "cannot be swept"),
    ],
)
def test_what_is_no_grid_is_said(config, words, says):
    with pytest.raises(ValueError) as error:
        sweep.plan(config, words)
    assert says in str(error.value)


def test_a_child_is_known_by_its_settings_and_its_data_not_by_where_they_lie(config, faces, tmp_path):
    data = {"path": str(faces), "attributes": ["Smiling"], "image_size": 64}
    make_run(tmp_path / "out" / "seed-0", {"name": "fader", "preset": "small"}, data=data, attributes=ShardSet.open(faces).attributes)
    about = tmp_path / "out" / "seed-0" / "run.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "data_digest": ShardSet.open(faces).digest}))
    (tmp_path / "moved").symlink_to(faces)

    def child(*words: str) -> sweep.Child:
        return sweep.plan(config, [f"data.path={tmp_path / 'moved'}", "seed=0,1", *words], tmp_path / "out").children[0]

    assert sweep.has_begun(child("data.threads=7", "data.prefetch=1", "data.cache=none", "judge=elsewhere"))
    with pytest.raises(ValueError, match="of other settings"):
        sweep.has_begun(child("data.flip=false"))
    about.write_text(json.dumps({**json.loads(about.read_text()), "data_digest": "d" * 64}))
    with pytest.raises(ValueError, match="of other data"):
        sweep.has_begun(child())


def found(**metrics) -> Compared:
    return Compared("x", {}, {}, metrics, 100)


def test_the_highest_accuracy_within_the_bound_of_no_lambda_is_chosen(config):
    asked = sweep.plan(config, ["method.latent.weight=0,1e-3,1e-2,1e-1"])
    runs = [
        found(mse=0.02, swap_accuracy=0.3),
        found(mse=0.01, swap_accuracy=0.5),
        found(mse=0.025, swap_accuracy=0.8, **{"swap_accuracy.Smiling": 0.8, "leak.Smiling": 0.7, "leak.Male": 0.9}),
        found(mse=0.0251, swap_accuracy=0.99),
    ]
    assert sweep.bound(asked, runs)[0] == 0.025 and sweep.chosen(asked, runs).label == "latent.weight-1e-2"
    drawn = sweep.table(asked, runs, "valid")
    assert drawn.header == ["latent.weight", "images", "MSE", "swap accuracy", "Smiling", "leak, mean"]
    assert drawn.rows[2] == ["* 1e-2", "100", "0.02500", "0.800", "0.800", "0.800"]
    assert drawn.rows[3][0] == "1e-1" and "MSE of λ = 0 (0.02000)" in drawn.note


def test_without_a_run_at_no_lambda_the_lowest_error_is_the_measure(config):
    asked = sweep.plan(config, ["method.latent.weight=1e-4,1e-3,1e-2"])
    runs = [None, found(mse=0.02, swap_accuracy=0.5), found(mse=0.026, swap_accuracy=0.9)]
    assert sweep.chosen(asked, runs).label == "latent.weight-1e-3"
    assert sweep.table(asked, runs, "valid").rows[0] == ["1e-4", "–", "–", "–"]
    assert sweep.chosen(asked, [None, None, None]) is None
    assert "None is chosen: no MSE is known" in sweep.table(asked, [None] * 3, "valid").note
