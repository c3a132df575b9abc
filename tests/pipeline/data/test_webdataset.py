"""Stock readers take our tars with no code of ours: webdataset's own, and DALI's own webdataset reader."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from fader.attributes import Attribute, Attributes
from pipeline.data.datasets.record import Dataset
from pipeline.data.shards import ShardSet, prepare
from pipeline.images import Preprocessing, decode, preprocess
from pipeline.loading.pillow import stock_stream

ATTRIBUTES = Attributes(
    [Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "moustache", "beard")), Attribute("Age", "continuous")]
)


class Drawn:
    """Reads a picture by drawing it: its brightness is its number."""

    def __call__(self, location: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (178, 218), (int(location), 50, 100)).save(out, "PNG" if int(location) == 7 else "JPEG")
        return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    splits = ["train"] * 20 + ["valid"] * 7 + ["test"] * 5
    labels = np.array([[n % 2, n % 4 - 1, n / 40] for n in range(32)], np.float32)
    dataset = Dataset(
        "drawn", {}, ATTRIBUTES.to_list(), [f"{n:06d}" for n in range(32)], splits, [str(n) for n in range(32)],
        labels, [f"row {n}" for n in range(32)], Drawn(),
    )
    return prepare(dataset, tmp_path_factory.mktemp("stock") / "shards", shard_records=8, workers=1)


def paths(shards: ShardSet, name: str) -> list[str]:
    return [str(path) for path in shards.split(name).shards]


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_stock_webdataset_reads_pictures_and_labels_as_the_manifest_has_them(shards, name):
    split = shards.split(name)
    samples = list(webdataset.WebDataset(paths(shards, name), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == split.keys.tolist()
    for row, sample in enumerate(samples):
        assert {key: pytest.approx(value) for key, value in sample["json"].items()} == dict(
            zip(ATTRIBUTES.names, split.labels[row].tolist(), strict=True)
        )
        picture = sample.get("jpg", sample.get("png"))
        assert np.array_equal(picture, np.asarray(decode(split.bytes(row))))


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_dali_s_own_reader_reads_pictures_and_labels_as_the_manifest_has_them(shards, name, indexed, tmp_path):
    split = shards.split(name)
    index = []
    for path in paths(shards, name) if indexed else []:
        index.append(str(tmp_path / f"{Path(path).stem}.idx"))
        tool = Path(sys.executable).with_name("wds2idx")
        subprocess.run([str(tool), path, index[-1]], check=True, stdout=subprocess.DEVNULL)

    @pipeline_def(batch_size=len(split), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def reading():
        encoded, labels = fn.readers.webdataset(
            paths=paths(shards, name), ext=["jpg;png", "json"], missing_component_behavior="error",
            **({"index_paths": index} if indexed else {}),
        )
        return fn.decoders.image(encoded, jpeg_fancy_upsampling=True), labels

    images, labels = reading().run()
    for row in range(len(split)):
        found = json.loads(bytes(np.asarray(labels.at(row))))
        assert list(found) == list(ATTRIBUTES.names)
        assert list(found.values()) == pytest.approx(split.labels[row].tolist())
        error = np.abs(np.asarray(images.at(row)).astype(int) - np.asarray(decode(split.bytes(row))).astype(int))
        assert error.mean() <= 0.3 and error.max() <= 2


def test_the_stock_stream_gives_the_pixels_and_labels_of_the_reference(shards):
    split, preprocessing = shards.split("train"), Preprocessing(64)
    some = ATTRIBUTES.select(["Age", "Smiling"])
    samples = list(stock_stream(split, some, preprocessing))
    assert [key for key, _, _ in samples] == split.keys.tolist()
    for row, (_, pixels, labels) in enumerate(samples):
        assert np.array_equal(pixels, preprocess(decode(split.bytes(row)), preprocessing))
        assert labels == pytest.approx(split.columns(some)[row])


def test_the_stock_stream_may_shuffle_and_be_spread_over_workers(shards):
    split = shards.split("train")
    stream = stock_stream(split, ATTRIBUTES, Preprocessing(32), window=10, seed=3)
    keys = [key for key, _, _ in stream]
    assert sorted(keys) == sorted(split.keys) and keys != split.keys.tolist()
    workers = torch.utils.data.DataLoader(stock_stream(split, ATTRIBUTES, Preprocessing(32)), 4, num_workers=2)
    assert sorted(key for keys, _, _ in workers for key in keys) == sorted(split.keys)
