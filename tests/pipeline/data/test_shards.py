"""Shards: equal bytes however they were made, readable by stock tools, no half-written set, no damage unseen."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import LeftOut
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.workers import silent, spread
from pipeline.data.shards import ShardSet, prepare, preparing, verify
from pipeline.images import decode
from tests.commands import environment
from tests.pipeline import planted
from tests.pipeline.planted import write_celeba

COUNT = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_celeba(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "set"
    prepare(read_celeba(source), out, shard_records=8, workers=1)
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what is written --------------------------------------------------------------------------------------------------


def test_tars_equal_those_of_webdataset_byte_for_byte(finished):
    import webdataset

    for tar in finished.glob("*.tar"):
        out = io.BytesIO()
        writer = webdataset.TarWriter(out, mtime=0, user="fader", group="fader", mode=0o444)
        with tarfile.open(tar) as members:
            data = {m.name: members.extractfile(m).read() for m in members}
        for name in data:
            if name.endswith(".jpg"):
                key = name[:-4]
                writer.write({"__key__": key, "jpg": data[name], "json": data[f"{key}.json"]})
        writer.close()
        assert tar.read_bytes() == out.getvalue()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_stock_webdataset_reads_pictures_and_labels_that_belong_together(finished, split):
    import webdataset

    urls = sorted(map(str, finished.glob(f"{split}-*.tar")))
    keys = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        assert tuple(sample["json"].values()) == planted.seen(np.asarray(sample["jpg"]))
        assert tuple(sample["json"]) == planted.NAMES
        keys.append(sample["__key__"])
    numbers = [n for n in range(1, COUNT + 1) if ("train", "valid", "test")[planted.split(n)] == split]
    assert sorted(keys) == [f"{n:06d}" for n in numbers]


def test_picture_bytes_are_stored_as_they_came_and_the_manifest_finds_them(finished):
    whole = ShardSet.open(finished)
    rows = 0
    for name in ("train", "valid", "test"):
        part = whole.split(name)
        for row, key in enumerate(part.keys):
            data = part.bytes(row)
            assert data.tobytes() == planted.jpeg(int(key)) and not data.flags.owndata
            assert tuple(part.labels[row]) == planted.labels(int(key))
            assert (part.width[row], part.height[row]) == (178, 218)
        rows += len(part)
    assert rows == COUNT


def test_a_split_is_in_a_fixed_shuffle_whatever_the_shard_size(finished, source, tmp_path):
    other = prepare(read_celeba(source), tmp_path / "set", shard_records=1000, workers=1)
    first = ShardSet.open(finished)
    assert other.digest == first.digest
    for name in ("train", "valid", "test"):
        keys = first.split(name).keys.tolist()
        assert keys == other.split(name).keys.tolist() and keys != sorted(keys)
        assert first.split(name).digest == other.split(name).digest
    assert len({first.split(name).digest for name in ("train", "valid", "test")}) == 3


def test_workers_and_place_leave_no_trace_in_any_byte(finished, tmp_path):
    moved = write_celeba(tmp_path / "elsewhere", COUNT)
    prepare(read_celeba(moved), tmp_path / "set", shard_records=8, workers=3)
    assert contents(tmp_path / "set") == contents(finished)
    text = (finished / "dataset.json").read_text()
    assert str(tmp_path) not in text and str(finished) not in text


def _process(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_this_process_works_beside_those_that_it_starts():
    first, second, *others = spread(_process, [1, 0, 0, 0], workers=2, total=4, progress=silent)
    assert first == os.getpid() != second and {*others} <= {first, second}


def test_a_set_is_the_same_where_only_headers_were_looked_at(source, finished, tmp_path):
    out = prepare(read_celeba(source), tmp_path / "set", shard_records=8, workers=1, check="header").path
    assert contents(out) == contents(finished)
    first = next((source / "img_align_celeba").iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:-300])
    try:
        with pytest.raises(ValueError, match="cut short"):
            prepare(read_celeba(source), tmp_path / "other", workers=1, check="header")
    finally:
        first.write_bytes(whole)


def test_the_data_digest_sees_labels_pictures_and_splits(source, finished, tmp_path):
    digests = {ShardSet.open(finished).digest}
    dataset = read_celeba(source)
    flipped = dataset.labels.copy()
    flipped[3, 1] = 1 - flipped[3, 1]
    moved = [("valid" if s == "train" else s) if row == 0 else s for row, s in enumerate(dataset.splits)]
    swapped = [dataset.locations[1], dataset.locations[0], *dataset.locations[2:]]
    for change in ({"labels": flipped}, {"splits": moved}, {"locations": swapped}):
        out = tmp_path / next(iter(change))
        digests.add(prepare(dataclasses.replace(dataset, **change), out, workers=1).digest)
    assert len(digests) == 4


def test_dataset_json_counts_what_is_there(finished):
    info = json.loads((finished / "dataset.json").read_text())
    for split, number in (("train", 0), ("valid", 1), ("test", 2)):
        those = [planted.labels(n) for n in range(1, COUNT + 1) if planted.split(n) == number]
        entry = info["splits"][split]
        assert entry["records"] == len(those) == sum(shard["records"] for shard in entry["shards"])
        for j, name in enumerate(planted.NAMES):
            present = sum(label[j] for label in those)
            assert entry["labels"][name] == {"0": len(those) - present, "1": present}
    assert [a["k"] for a in info["attributes"]] == [2, 2, 2] and info["left_out"] == []


def kinds(tmp_path: Path) -> Dataset:
    """Binary, k-way and continuous attributes, with unknown labels, of pictures in three formats."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (20 + i, 30), (40 * i, 0, 0)).save(folder / str(i), ("JPEG", "PNG", "WEBP")[i % 3])
    return Dataset(
        name="kinds",
        source={},
        attribute_list=[
            {"name": "On", "kind": "binary", "categories": []},
            {"name": "Hue", "kind": "k-way", "categories": ["a", "b", "c"]},
            {"name": "Much", "kind": "continuous", "categories": []},
        ],
        keys=[f"k-{i}" for i in range(6)],
        splits=["train"] * 6,
        locations=[str(folder / str(i)) for i in range(6)],
        labels=np.array([[i % 2, i % 3, i / 8] if i else [-1, -1, -1] for i in range(6)], np.float32),
        places=[f"row {i}" for i in range(6)],
        read=read_file,
    )


def read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def test_all_kinds_of_attributes_and_formats_go_through(tmp_path):
    whole = prepare(kinds(tmp_path), tmp_path / "set", workers=1)
    part = whole.split("train")
    order = [int(key[2:]) for key in part.keys]
    assert np.array_equal(part.labels, kinds(tmp_path / str(os.mkdir(tmp_path / "None"))).labels[order])
    assert [decode(part.bytes(row)).size for row in range(6)] == [(20 + i, 30) for i in order]
    assert part.width.tolist() == [20 + i for i in order]
    assert whole.info["splits"]["train"]["labels"]["Hue"] == {"a": 1, "b": 2, "c": 2, "unknown": 1}
    assert whole.info["splits"]["train"]["labels"]["Much"] == {"mean": 3 / 8, "unknown": 1}
    assert whole.manifest.schema.field("On").type == "int8" and whole.manifest.schema.field("Much").type == "float"
    with tarfile.open(tmp_path / "set/train-000000.tar") as tar:
        assert json.loads(tar.extractfile("k-5.json").read()) == {"On": 1, "Hue": 2, "Much": 0.625}
        assert {"k-0.jpg", "k-1.png", "k-2.webp"} < set(tar.getnames())
    assert verify(tmp_path / "set", workers=1).records == 6


# --- opening ----------------------------------------------------------------------------------------------------------


def test_columns_select_and_refuse(finished):
    from fader.attributes import Attribute, Attributes

    part = ShardSet.open(finished).split("train")
    chosen = part.columns(part.attributes.select(["Odd", "Bright"]))
    assert chosen.dtype == np.float32 and chosen.tolist() == [
        [planted.labels(int(k))[2], planted.labels(int(k))[0]] for k in part.keys
    ]
    with pytest.raises(ValueError, match="did you mean 'Bright'"):
        part.columns(Attributes([Attribute("Brigth")]))
    with pytest.raises(ValueError, match=r"Odd is binary in this set, k-way \(a, b\) is asked for"):
        part.columns(Attributes([Attribute("Odd", "k-way", ("a", "b"))]))


def test_bytes_are_right_from_many_threads_and_after_pickling(finished):
    part = pickle.loads(pickle.dumps(ShardSet.open(finished).split("train")))
    wrong = []

    def read() -> None:
        wrong.extend(row for row, key in enumerate(part.keys) if part.bytes(row).tobytes() != planted.jpeg(int(key)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_absent_or_unfinished_set_does_not_open(tmp_path, finished):
    with pytest.raises(ValueError, match="is not there; write it with 'fader prepare'"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no shard set"):
        ShardSet.open(tmp_path)
    half = Path(shutil.copytree(finished, tmp_path / "half"))
    (half / "dataset.json").unlink()
    (half / ".prepare").mkdir()
    for read in (ShardSet.open, verify):
        with pytest.raises(ValueError, match="is not finished.*'fader prepare' again"):
            read(half)


def test_a_path_may_begin_with_the_home_folder(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished.parent))
    assert ShardSet.open("~/set").path == finished


def test_unknown_and_empty_splits_are_refused(source, tmp_path, finished):
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        ShardSet.open(finished).split("validation")
    dataset = read_celeba(source)
    only = prepare(dataclasses.replace(dataset, splits=["train"] * COUNT), tmp_path / "set", workers=1)
    with pytest.raises(ValueError, match=r"has no test records \(train 60, valid 0, test 0\)"):
        only.split("test")


@pytest.mark.parametrize(
    "entries",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"format": 99}',
        b'{"format": 1, "splits": {"train": {"shards": [{"file": "../x.tar"}]}}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_description_is_refused(copy, entries):
    (copy / "dataset.json").write_bytes(entries)
    for read in (ShardSet.open, verify):
        with pytest.raises(ValueError, match="dataset.json is damaged"):
            read(copy)


# --- damage -----------------------------------------------------------------------------------------------------------


def planted_in_tar(name: str, change):
    def plant(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        with tarfile.open(folder / name) as tar:
            member = tar.getmembers()[2]  # a picture
        change(data, member.offset_data, member.size)
        (folder / name).write_bytes(data)

    return plant


def flip(place):
    def change(data: bytearray, offset: int, size: int) -> None:
        data[place(offset, size)] ^= 1

    return change


def swap_labels(folder: Path) -> None:
    """Labels exchanged inside one tar: valid JSON, right length, wrong truth."""
    data = bytearray((folder / "train-000000.tar").read_bytes())
    place = data.index(b'"Odd": 1')
    data[place + 7 : place + 8] = b"0"
    (folder / "train-000000.tar").write_bytes(data)


def change_manifest(folder: Path) -> None:
    data = bytearray((folder / "manifest.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "manifest.parquet").write_bytes(data)


def swap_tars(folder: Path) -> None:
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


A, B, V, T = "train-000000.tar", "train-000001.tar", "valid-000000.tar", "test-000000.tar"
DAMAGE = {
    "first byte": (planted_in_tar(B, flip(lambda o, s: o)), rf"{B}: \d{{6}}.jpg differs from its digest"),
    "last byte": (planted_in_tar(B, flip(lambda o, s: o + s - 1)), rf"{B}: \d{{6}}.jpg differs from its digest"),
    "padding": (planted_in_tar(B, flip(lambda o, s: o + s)), rf"{B}: \d{{6}}.jpg differs"),
    "header": (planted_in_tar(V, flip(lambda o, s: o - 500)), rf"{V}: the header of \d{{6}}.jpg is damaged"),
    "end": (planted_in_tar(T, lambda data, o, s: data.__setitem__(-1, 1)), f"{T}: the end of the tar is damaged"),
    "labels": (swap_labels, rf"{A}: \d{{6}}.json differs from the labels"),
    "cut short": (lambda f: os.truncate(f / A, 10240), f"{A} is 10,240 bytes, dataset.json says .* written short"),
    "missing": (lambda f: (f / B).unlink(), f"{B} is missing"),
    "extra tar": (lambda f: (f / "train-000099.tar").touch(), "train-000099.tar does not belong to the set"),
    "manifest": (change_manifest, "manifest.parquet differs from its digest"),
    "manifest cut short": (lambda f: os.truncate(f / "manifest.parquet", 100), "manifest.parquet is 100 bytes"),
    "two tars swapped": (swap_tars, f"({A}|{B})"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_what_is_damaged(copy, name):
    assert verify(copy, workers=1).records == COUNT
    plant, message = DAMAGE[name]
    plant(copy)
    with pytest.raises(ValueError, match=message):
        verify(copy, workers=1)


@pytest.mark.parametrize("name", ["cut short", "missing", "manifest", "manifest cut short"])
def test_damage_that_costs_nothing_to_see_is_seen_on_opening(copy, name):
    plant, message = DAMAGE[name]
    plant(copy)
    with pytest.raises(ValueError, match=message):
        ShardSet.open(copy)


def test_verify_lists_every_damaged_place_over_several_processes(copy):
    for tar in ("train-000000.tar", "train-000002.tar"):
        planted_in_tar(tar, flip(lambda o, s: o))(copy)
    with pytest.raises(ValueError, match="damaged in 2 places: train-000000.tar: .*; train-000002.tar: "):
        verify(copy, workers=2)


# --- what is bad, what goes on, what is refused -----------------------------------------------------------------------


def bad_source(tmp_path: Path) -> Path:
    folder = write_celeba(tmp_path / "bad", COUNT)
    (folder / "img_align_celeba/000007.jpg").unlink()
    (folder / "img_align_celeba/000020.jpg").write_bytes(planted.jpeg(20)[:-300])
    return folder


def test_a_bad_picture_is_named_with_file_and_line(tmp_path):
    dataset = read_celeba(bad_source(tmp_path))
    message = r"attr_celeba.txt line (9: picture 000007.jpg is missing|22: picture 000020.jpg cannot be read: not a)"
    for workers in (1, 2):
        with pytest.raises(ValueError, match=message):
            prepare(dataset, tmp_path / "set", shard_records=8, workers=workers)
    assert not (tmp_path / "set/dataset.json").exists()


def test_skip_bad_lists_them_and_changes_no_other_shard(tmp_path, finished):
    dataset = read_celeba(bad_source(tmp_path))
    whole = prepare(dataset, tmp_path / "set", shard_records=8, workers=2, skip_bad=True)
    assert sorted(entry["key"] for entry in whole.info["left_out"]) == ["000007", "000020"]
    assert all("list_attr_celeba.txt line" in entry["reason"] for entry in whole.info["left_out"])
    assert sum(split["records"] for split in whole.info["splits"].values()) == COUNT - 2
    before, after = contents(finished), contents(tmp_path / "set")
    different = {name for name in before if before[name] != after[name]} - {"manifest.parquet", "dataset.json"}
    assert 1 <= len(different) <= 2 and set(before) == set(after)
    assert verify(tmp_path / "set", workers=1).records == COUNT - 2


def test_what_the_index_left_out_is_listed_too(tmp_path, source):
    dataset = dataclasses.replace(read_celeba(source), left_out=[LeftOut("000099", "line 5: no row")])
    assert prepare(dataset, tmp_path, workers=1).info["left_out"][0] == {"key": "000099", "reason": "line 5: no row"}


def test_a_mended_picture_is_taken_in_when_a_skipping_run_goes_on(tmp_path, finished, monkeypatch):
    folder = bad_source(tmp_path)
    monkeypatch.setattr(preparing, "manifest_of", lambda *_: 1 / 0)  # ends after the shards, before the set is finished
    with pytest.raises(ZeroDivisionError):
        prepare(read_celeba(folder), tmp_path / "set", shard_records=8, workers=1, skip_bad=True)
    monkeypatch.undo()
    for number in (7, 20):
        (folder / f"img_align_celeba/{number:06d}.jpg").write_bytes(planted.jpeg(number))
    prepare(read_celeba(folder), tmp_path / "set", shard_records=8, workers=1)
    assert contents(tmp_path / "set") == contents(finished)


def test_finished_shards_are_kept_and_damaged_ones_written_again(tmp_path, source, finished, monkeypatch):
    monkeypatch.setattr(preparing, "manifest_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(read_celeba(source), tmp_path / "set", shard_records=8, workers=1)
    monkeypatch.undo()
    times = {tar.name: tar.stat().st_mtime_ns for tar in (tmp_path / "set").glob("*.tar")}
    planted_in_tar("train-000001.tar", flip(lambda o, s: o))(tmp_path / "set")
    (tmp_path / "set/train-000002.tar").unlink()
    prepare(read_celeba(source), tmp_path / "set", shard_records=8, workers=1)
    assert contents(tmp_path / "set") == contents(finished)
    written = {name for name, when in times.items() if (tmp_path / "set" / name).stat().st_mtime_ns != when}
    assert written == {"train-000001.tar", "train-000002.tar"}


def test_a_finished_set_is_left_alone_and_another_source_refused(copy, source, tmp_path):
    before = contents(copy)
    assert prepare(read_celeba(source), copy, shard_records=8).digest == ShardSet.open(copy).digest
    other = write_celeba(tmp_path / "other", COUNT + 1)
    for dataset, records in ((read_celeba(other), 8), (read_celeba(source), 16)):
        with pytest.raises(ValueError, match="already holds a finished set of another source"):
            prepare(dataset, copy, shard_records=records, workers=1)
    assert contents(copy) == before


def test_an_unfinished_set_of_another_source_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "manifest_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(read_celeba(source), tmp_path / "set", shard_records=8, workers=1)
    with pytest.raises(ValueError, match="unfinished set of another source"):
        prepare(read_celeba(source), tmp_path / "set", shard_records=9, workers=1)


def test_a_folder_with_other_files_is_refused(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds thesis.txt and no shard set"):
        prepare(read_celeba(source), tmp_path, workers=1)
    with pytest.raises(ValueError, match="is a file"):
        prepare(read_celeba(source), tmp_path / "thesis.txt", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_keys_that_escape_and_attributes_that_shadow_columns_are_refused(source, tmp_path):
    dataset = read_celeba(source)
    for key in ("../x", "a/b", "..", "a.b", "", "x" * 91, "a b", "ä"):
        with pytest.raises(ValueError, match="is no plain name"):
            dataclasses.replace(dataset, keys=[key, *dataset.keys[1:]])
    with pytest.raises(ValueError, match="a key stands twice"):
        dataclasses.replace(dataset, keys=["000001", "000001", *dataset.keys[2:]])
    named = [{"name": "digest", "kind": "binary", "categories": []}, *dataset.attribute_list[1:]]
    with pytest.raises(ValueError, match="'digest' is called like a column"):
        prepare(dataclasses.replace(dataset, attribute_list=named), tmp_path / "set")


# --- killed -----------------------------------------------------------------------------------------------------------

KILLED_AT_EVERY_STEP = """
import os, signal, sys

import pyarrow.parquet  # once, not in every child
from pipeline.data import shards
from pipeline.data.datasets.celeba import read_celeba

dataset, out = read_celeba(sys.argv[1]), sys.argv[2]
steps = ("replace", "fsync", "unlink", "mkdir", "rmdir")
real = {name: getattr(os, name) for name in steps} | {"fsync": lambda handle: None}
for number in range(int(sys.argv[3]), 10000):
    child = os.fork()
    if not child:
        left = number
        def counted(name):
            def step(*args, **kwargs):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real[name](*args, **kwargs)
            return step
        for name in steps:
            setattr(os, name, counted(name))
        shards.prepare(dataset, f"{out}/{number}", shard_records=1000, workers=1)
        os._exit("pandas" in sys.modules)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
print(number, status)
"""


def test_killed_at_every_step_it_never_looks_finished_and_ends_in_the_same_bytes(source, tmp_path, monkeypatch):
    """One run for each call that changes the disk, killed (-9) right before it; then the same command once more.

    fsync counts as a step and is not called: only a power cut could tell, and a thousand of them take half a minute.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    line = [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(source), str(tmp_path), "0"]
    done = subprocess.run(line, env=environment(), check=True, capture_output=True, text=True)
    steps, status = map(int, done.stdout.split())
    assert status == 0, "it failed or loaded pandas, which takes as long as to write 5,000 records"
    expected = contents(tmp_path / str(steps))
    assert steps > 20 and len(expected) == 5
    for number in range(steps):
        out = tmp_path / str(number)
        if (out / "dataset.json").exists():
            assert verify(out, workers=1).records == COUNT
        else:
            with pytest.raises(ValueError, match="not finished|is not there|holds no shard set"):
                ShardSet.open(out)
        prepare(read_celeba(source), out, shard_records=1000, workers=1)
        assert contents(out) == expected, f"killed at step {number}"
