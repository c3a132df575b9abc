"""CelebA's published files: every oddity is read, every fault is named with file and line."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.data.datasets.celeba import read_celeba
from pipeline.images import decode
from tests.pipeline import planted
from tests.pipeline.planted import records, write_celeba

A, P = "list_attr_celeba.txt", "list_eval_partition.txt"


def replace(line: int, text: str):
    """Replace one line (from 1) of a file."""
    return lambda lines: [text if number == line else each for number, each in enumerate(lines, 1)]


def test_labels_splits_and_keys_belong_to_the_pictures(tmp_path):
    dataset = read_celeba(write_celeba(tmp_path, 40))
    assert dataset.attributes.names == planted.NAMES and len(dataset) == 40
    for record in records(dataset):
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
    "zero among signs": (
        {"annotation": replace(5, "000003.jpg  1  0 -1")},
        rf"{A} line 5: Red_Left is '0'; 1 or -1 is needed",
    ),
    "word for a value": ({"annotation": replace(5, "000003.jpg  1  1 yes")}, rf"{A} line 5: Odd is 'yes'"),
    "too few values": ({"annotation": replace(6, "000004.jpg  1 -1")}, rf"{A} line 6: 2 values for 3 attributes"),
    "too many values": ({"annotation": replace(6, "000004.jpg  1 -1 1 1")}, rf"{A} line 6: 4 values for 3 attributes"),
    "blank row": ({"annotation": replace(6, "")}, rf"{A} line 6: 0 values for 3 attributes"),
    "duplicate key": (
        {"annotation": replace(7, "000002.jpg 1 1 1")},
        rf"{A} line 7: '000002' stands at {A} line 4 already",
    ),
    "not a jpg": (
        {"annotation": replace(7, "000005.gif 1 1 1")},
        rf"{A} line 7: '000005.gif' is not the name of a .jpg",
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
    for record in records(dataset):
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


# --- relatives --------------------------------------------------------------------------------------------------------


def same_labels(dataset, count: int) -> bool:
    return len(dataset) == count and all(tuple(r.labels) == planted.labels(int(r.key)) for r in records(dataset))


def test_kaggles_csvs_and_its_folder_in_a_folder_are_read(tmp_path):
    folder = write_celeba(tmp_path / "x", 12)
    for name, header in ((A, ",".join(["image_id", *planted.NAMES])), (P, "image_id,partition")):
        lines = (folder / name).read_text().split("\n")[2 if name == A else 0 :]
        rows = [",".join(line.split()) for line in lines if line.strip()]
        (folder / name).with_suffix(".csv").write_text("\n".join([header, *rows]) + "\n")
        (folder / name).unlink()
    (folder / "img_align_celeba").rename(folder / "inner")
    (folder / "img_align_celeba").mkdir()
    (folder / "inner").rename(folder / "img_align_celeba/img_align_celeba")
    dataset = read_celeba(folder)
    assert same_labels(dataset, 12) and dataset.attributes.names == planted.NAMES
    assert dataset.splits == [("train", "valid", "test")[planted.split(n)] for n in range(1, 13)]
    assert planted.seen(np.asarray(decode(dataset.read(dataset.locations[4])))) == planted.labels(5)
    (folder / "list_attr_celeba.csv").write_text((folder / "list_attr_celeba.csv").read_text().replace("000004.jpg,", "x,"))
    with pytest.raises(ValueError, match="list_attr_celeba.csv line 5: 'x' is not the name"):
        read_celeba(folder)


@pytest.mark.parametrize("parted", [";", "\t", '","'])
@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
@pytest.mark.parametrize("absent", ["-1", "0"])
def test_csvs_that_other_programs_wrote_again_are_read(tmp_path, parted, index, absent):
    folder = write_celeba(tmp_path, 12)
    for name, header in ((A, ["image_id", *planted.NAMES]), (P, ["image_id", "partition"])):
        rows = [line.replace("-1", absent).split() for line in (folder / name).read_text().split("\n")[2 if name == A else 0 :]]
        rows = [[index, *header], *([str(n), *row] for n, row in enumerate(row for row in rows if row))]
        quote = '"' if '"' in parted else ""
        (folder / name).with_suffix(".csv").write_text("\n".join(quote + parted.join(row) + quote for row in rows))
        (folder / name).unlink()
    dataset = read_celeba(folder)
    assert same_labels(dataset, 12) and dataset.attributes.names == planted.NAMES


def test_labels_of_0_and_1_are_told_by_all_rows_and_other_words_lead_on(tmp_path):
    def zeros(lines: list[str]) -> list[str]:
        ones = lines[2].replace("-1", "1").replace(" 0", " 1")
        return [*lines[:2], ones, *(line.replace("-1", " 0") for line in lines[3:])]

    dataset = read_celeba(write_celeba(tmp_path / "ones", 12, annotation=zeros))
    assert (dataset.labels[0] == 1).all() and (dataset.labels[1:] == 0).any()
    with pytest.raises(ValueError, match="is 'True'; 1 or -1 is needed .'fader prepare table' reads other words"):
        read_celeba(write_celeba(tmp_path / "words", 3, annotation=lambda lines: [line.replace(" 1", " True") for line in lines]))
    (tmp_path / "ones" / P).unlink()
    with pytest.raises(ValueError, match="no partition file .*; without one, 'fader prepare table'"):
        read_celeba(tmp_path / "ones")


def test_labels_of_0_and_1_a_byte_order_mark_and_other_extensions_are_read(tmp_path):
    def zeros(lines: list[str]) -> list[str]:
        return [*lines[:2], *(line.replace("-1", " 0") for line in lines[2:])]

    folder = write_celeba(tmp_path / "zeros", 12, annotation=zeros)
    (folder / A).write_bytes(b"\xef\xbb\xbf" + (folder / A).read_bytes())
    assert same_labels(read_celeba(folder), 12)
    for extension in ("JPG", "png"):
        folder = write_celeba(tmp_path / extension, 12)
        for picture in (folder / "img_align_celeba").iterdir():
            picture.rename(picture.with_suffix(f".{extension}"))
        if extension == "png":
            (folder / "img_align_celeba").rename(folder / "img_align_celeba_png")
        dataset = read_celeba(folder)
        assert same_labels(dataset, 12) and dataset.read(dataset.locations[3]) == planted.jpeg(4)


def test_celebamask_hq_is_read_and_split_by_a_hash(tmp_path):
    folder = write_celeba(tmp_path, 30)
    (folder / A).rename(folder / "CelebAMask-HQ-attribute-anno.txt")
    (folder / "img_align_celeba").rename(folder / "CelebA-HQ-img")
    (folder / P).unlink()
    dataset = read_celeba(folder)
    assert same_labels(dataset, 30) and set(dataset.splits) == {"train", "valid", "test"}
    assert dataset.source["split"] == "80/10/10 by a hash of its key"


def test_a_celeba_with_train_records_alone_gets_a_tenth_as_valid_and_a_tenth_as_test(tmp_path):
    def train(lines: list[str]) -> list[str]:
        return [f"{line.split()[0]} 0" for line in lines]

    dataset = read_celeba(write_celeba(tmp_path, 200, partition=train))
    assert [10 < dataset.splits.count(split) < 35 for split in ("valid", "test")] == [True, True]
    assert "no valid and no test" in dataset.source["split"]
