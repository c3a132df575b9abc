"""CelebA's published files: every oddity is read, every fault is named with file and line."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.data.datasets.celeba import read_celeba
from pipeline.images import decode
from tests.pipeline import planted
from tests.pipeline.planted import write_celeba

A, P = "list_attr_celeba.txt", "list_eval_partition.txt"


def replace(line: int, text: str):
    """Replace one line (from 1) of a file."""
    return lambda lines: [text if number == line else each for number, each in enumerate(lines, 1)]


def test_labels_splits_and_keys_belong_to_the_pictures(tmp_path):
    dataset = read_celeba(write_celeba(tmp_path, 40))
    assert dataset.attributes.names == planted.NAMES and len(dataset) == 40
    for record in dataset.records:
        number = int(record.key)
        assert (
            tuple(record.labels)
            == planted.labels(number)
            == planted.seen(np.asarray(decode(dataset.read(record.location))))
        )
        assert record.split == ("train", "valid", "test")[planted.split(number)]
        assert record.place == f"{A} line {number + 2}"


def test_line_ends_and_folders_make_no_difference(tmp_path):
    sets = [
        read_celeba(write_celeba(tmp_path / "crlf", 12)),
        read_celeba(write_celeba(tmp_path / "official", 12, places=("Anno", "Eval", "Img"))),
    ]
    assert sets[0].digest() == sets[1].digest()
    unix = read_celeba(write_celeba(tmp_path / "lf", 12, end="\n"))
    assert (unix.labels == sets[0].labels).all() and unix.keys == sets[0].keys and unix.splits == sets[0].splits


def test_the_split_comes_from_the_partition_file_not_from_position(tmp_path):
    dataset = read_celeba(write_celeba(tmp_path, 12, partition=lambda lines: list(reversed(lines))))
    assert dataset.splits == [("train", "valid", "test")[planted.split(n)] for n in range(1, 13)]


FAULTS = {
    "stops short": (
        {"annotation": lambda lines: lines[:8]},
        rf"{A} line 8: the file stops short: line 1 announces 12 rows, 6 follow",
    ),
    "goes on": (
        {"annotation": lambda lines: [*lines, "000099.jpg 1 1 1"]},
        rf"{A} line 15: the file goes on: .* 12 rows, 13 follow",
    ),
    "no count": (
        {"annotation": lambda lines: lines[1:]},
        rf"{A} line 1: 'Bright Red_Left Odd' is not the number of pictures",
    ),
    "zero for absent": (
        {"annotation": replace(5, "000003.jpg  1  0 -1")},
        rf"{A} line 5: Red_Left is '0'; 1 or -1 is needed",
    ),
    "word for a value": ({"annotation": replace(5, "000003.jpg  1  1 yes")}, rf"{A} line 5: Odd is 'yes'"),
    "too few values": ({"annotation": replace(6, "000004.jpg  1 -1")}, rf"{A} line 6: 2 values for 3 attributes"),
    "too many values": ({"annotation": replace(6, "000004.jpg  1 -1 1 1")}, rf"{A} line 6: 4 values for 3 attributes"),
    "blank row": ({"annotation": replace(6, "")}, rf"{A} line 6: 0 values for 3 attributes"),
    "duplicate key": (
        {"annotation": replace(7, "000002.jpg 1 1 1")},
        rf"{A} line 7: 000002.jpg stands in line 4 already",
    ),
    "not a jpg": (
        {"annotation": replace(7, "000005.png 1 1 1")},
        rf"{A} line 7: '000005.png' is not the name of a .jpg",
    ),
    "escaping key": (
        {"annotation": replace(7, "../../etc/x.jpg 1 1 1")},
        rf"{A} line 7: '../../etc/x' is no plain name",
    ),
    "absolute key": ({"annotation": replace(7, "/etc/x.jpg 1 1 1")}, rf"{A} line 7: '/etc/x' is no plain name"),
    "dotted key": ({"annotation": replace(7, "a.b.jpg 1 1 1")}, rf"{A} line 7: 'a.b' is no plain name"),
    "no partition": ({"partition": lambda lines: lines[:3] + lines[4:]}, rf"{A} line 6: 000004.jpg has no row in {P}"),
    "partition 3": (
        {"partition": replace(4, "000004.jpg 3")},
        rf"{P} line 4: partition of '000004.jpg' is '3'; 0 \(train\)",
    ),
    "partition twice": (
        {"partition": lambda lines: [*lines, "000004.jpg 0"]},
        rf"{P} line 13: 000004.jpg stands in line 4 already",
    ),
    "attribute twice": ({"annotation": replace(2, "Odd Bright Odd ")}, rf"{A} line 2: attribute 'Odd' stands twice"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_and_line(tmp_path, name):
    options, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        read_celeba(write_celeba(tmp_path, 12, **options))


SKIPPED = {name: kind for name, kind in FAULTS.items() if name not in ("no count", "attribute twice")}


@pytest.mark.parametrize("name", SKIPPED)
def test_skip_bad_goes_on_and_lists_what_it_left_out(tmp_path, name):
    options, message = SKIPPED[name]
    dataset = read_celeba(write_celeba(tmp_path, 12, **options), skip_bad=True)
    reasons = " | ".join(entry.reason for entry in dataset.left_out)
    assert re.search(message, reasons)
    assert len(dataset) in ((6,) if name == "stops short" else (10, 11, 12))
    for record in dataset.records:
        assert tuple(record.labels) == planted.labels(int(record.key))


def test_a_file_that_stops_short_lists_the_pictures_it_lost(tmp_path):
    dataset = read_celeba(write_celeba(tmp_path, 12, annotation=lambda lines: lines[:8]), skip_bad=True)
    assert [entry.key for entry in dataset.left_out] == [None, *(f"{n:06d}" for n in range(7, 13))]


def test_missing_files_are_named(tmp_path):
    for name, message in ((A, "no annotation file"), (P, "no partition file")):
        folder = write_celeba(tmp_path / name, 3)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=message):
            read_celeba(folder)
    with pytest.raises(ValueError, match="there is no such folder"):
        read_celeba(tmp_path / "nowhere")
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip/img_align_celeba.zip").touch()
    with pytest.raises(ValueError, match="unzip it first"):
        read_celeba(tmp_path / "zip")


def test_a_byte_that_is_not_ascii_is_named_by_line(tmp_path):
    folder = write_celeba(tmp_path, 3)
    data = (folder / A).read_bytes()
    (folder / A).write_bytes(data[:-6] + b"\xff" + data[-5:])
    with pytest.raises(ValueError, match=f"{A} line 5: a byte is not ASCII"):
        read_celeba(folder)


def test_kway_attributes_come_from_a_file_of_their_own(tmp_path):
    folder = write_celeba(tmp_path, 5)
    kway = folder / "list_kway_attributes.txt"
    kway.write_text("5\nShirt:red,green,blue \n" + "".join(f"{n:06d}.jpg  {n % 3}\n" for n in range(1, 6)))
    dataset = read_celeba(folder, kway=kway.name)
    assert dataset.attributes[3].categories == ("red", "green", "blue") and dataset.attributes[3].kind == "k-way"
    assert dataset.labels[:, 3].tolist() == [1, 2, 0, 1, 2]
    kway.write_text(kway.read_text().replace("000003.jpg  0", "000003.jpg  3"))
    with pytest.raises(ValueError, match=f"{kway.name} line 5: Shirt is '3'; 0 or 1 or 2 is needed"):
        read_celeba(folder, kway=kway.name)
    kway.write_text(kway.read_text().replace("Shirt:red,green,blue", "Shirt"))
    with pytest.raises(ValueError, match=f"{kway.name} line 2: 'Shirt' does not name"):
        read_celeba(folder, kway=kway.name)
