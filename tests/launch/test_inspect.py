"""`fader inspect`: the numbers it tells are those of the set, and what it plants is found."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import inspection
from pipeline.data.datasets import DATASETS
from pipeline.data.shards import ShardSet, prepare
from tests.warm import forked

COUNT = 60


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Male implies Tall; Hat is rare; two pictures are equal across splits; qualities are 60 and 90."""
    folder = tmp_path_factory.mktemp("planted")
    rows = ["path,split,Male,Tall,Hat,Colour,age"]
    for n in range(COUNT):
        male, tall = n % 2, int(n % 2 or n % 4 == 0)
        rows.append(
            f"{n}.jpg,{('train', 'train', 'valid', 'test')[n // 3 % 4]},{male},{tall},{int(n == 1)},"
            f"{('red', 'green', 'blue')[n % 3]},{'' if n % 5 == 0 else n / 100}"
        )
        noise = np.random.default_rng(0 if n in (0, 9) else n).integers(0, 256, (40, 30 + n % 2 * 10, 3), np.uint8)
        if n == 9:
            noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.jpg", quality=60 if n in (0, 9) or n % 2 else 90)
    (folder / "list.csv").write_text("\n".join(rows))
    prepare(DATASETS["table"](folder / "list.csv"), folder / "set", workers=1)
    return folder / "set"


def test_counts_rarity_sizes_quality_and_duplicates_are_true(planted):
    found = inspection.inspect(ShardSet.open(planted))
    text = found.text
    assert "table: 60 records" in text and "train 30 (50%), valid 15 (25%), test 15 (25%)" in text
    line = next(line for line in text.splitlines() if line.startswith("age > 0.5"))
    assert line.split()[-1] == "12"
    assert "rare in train (below 20% of an even share): Hat (3.3%)" in text
    assert "width: 30 to 40 pixels" in text and "height: 40 pixels everywhere" in text and "formats: jpg 60" in text
    assert "read off the tables of 60: 60 to 90 of 100" in text
    assert "2 pictures in 1 groups of equal bytes; 1 of them stand in several splits" in text
    assert found.metrics["duplicates/across_splits"] == 1 and found.metrics["train/records"] == 30
    for name in ("attributes", "cooccurrence", "sizes", "contact"):
        assert min(Image.open(io.BytesIO(found.pictures[name])).size) > 100
    assert inspection.inspect(ShardSet.open(planted)).pictures["contact"] == found.pictures["contact"]


def test_cooccurrence_is_conditional_and_leaves_out_the_unknown():
    held = np.array([[1, 1], [1, 0], [0, 1], [1, np.nan], [np.nan, 1]], np.float32)
    assert inspection.cooccurrence(held) == pytest.approx(np.array([[1, 1 / 2], [1 / 2, 1]]))
    assert np.isnan(inspection.cooccurrence(np.zeros((3, 2), np.float32))).all()


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 92, 100])
def test_the_quality_of_a_jpeg_is_read_off_its_table(quality):
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG", quality=quality)
    assert inspection.jpeg_quality(Image.open(out).quantization[0]) == quality


def test_the_command_writes_text_and_pictures_and_logs_them(planted, tmp_path):
    store = tmp_path / "store"
    done = forked(
        "launch.inspect", planted, "--to", tmp_path / "report", "--log", "sets",
        MLFLOW_TRACKING_URI=f"sqlite:///{store}.db", cwd=tmp_path,
    )  # fmt: skip
    assert "table: 60 records" in done.stdout and "next: " in done.stdout
    names = {p.name for p in (tmp_path / "report").iterdir() if p.is_file()}
    assert names == {"attributes.png", "cooccurrence.png", "sizes.png", "contact.png", "inspect.txt"}
    import sqlite3

    with sqlite3.connect(f"{store}.db") as database:
        assert database.execute("select count(*) from metrics where key = 'train/records' and value = 30").fetchone()[0]
    wrong = forked("launch.inspect", tmp_path / "nowhere", code=2).stderr.strip()
    assert "is not there" in wrong and "\n" not in wrong


def test_a_set_that_cannot_be_written_to_is_inspected_from_a_folder_here(planted, tmp_path):
    """A file where the folder should stand refuses it as a read-only set does, also when root runs the test."""
    copy = Path(shutil.copytree(planted, tmp_path / "set", ignore=shutil.ignore_patterns("inspect")))
    (copy / "inspect").write_text("")
    done = forked("launch.inspect", copy, cwd=tmp_path)
    assert "wrote" in done.stdout and (tmp_path / "inspect-set/contact.png").is_file()
    refused = forked("launch.inspect", copy, "--to", copy / "inspect/x", code=2).stderr.strip()
    assert "name another folder with --to" in refused and "\n" not in refused


def test_a_set_at_an_address_is_inspected(planted, tmp_path):
    done = forked(
        "launch.inspect", planted.as_uri(), "--to", tmp_path / "report", FADER_CACHE=str(tmp_path / "cache"), cwd=tmp_path
    )
    assert "table: 60 records" in done.stdout and (tmp_path / "report/contact.png").is_file()
