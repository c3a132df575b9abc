"""What people's own tables, folders and tars look like: nulls, words for unknown, leftovers of other programs."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.datasets import DATASETS, Dataset
from pipeline.data.datasets.columns import Column, Kind
from pipeline.data.datasets.source import Place
from pipeline.data.shards import prepare
from pipeline.images import Preprocessing
from pipeline.loading.dali import open_loader
from tests.pipeline.data.test_datasets import column, encoded, grey, seen, tar_of
from tests.pipeline.planted import records

COUNT = 60
PATHS = [f"p/{n:03d}.jpg" for n in range(COUNT)]
SMILING = [n % 2 for n in range(COUNT)]


def splits_of(dataset: Dataset) -> dict[int, str]:
    """By the number of each record's picture."""
    return {int(record.location[2:5]): record.split for record in records(dataset)}


def table(folder: Path, parquet: bool, **columns: list) -> Path:
    folder.mkdir(exist_ok=True)
    columns = {"path": PATHS, "Smiling": SMILING, **columns}
    if parquet:
        pq.write_table(pa.table(columns), folder / "list.parquet")
        return folder / "list.parquet"
    rows = [",".join("" if cell is None else str(cell) for cell in row) for row in zip(*columns.values())]
    (folder / "list.csv").write_text("\n".join([",".join(columns), *rows]))
    return folder / "list.csv"


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parquet", [True, False])
def test_a_null_in_split_is_a_fault_of_its_row_and_moves_no_other(tmp_path, parquet):
    given = ["train" if n < 40 else "valid" if n < 50 else "test" for n in range(COUNT)]
    source = table(tmp_path, parquet, split=[None if n % 3 == 0 else given[n] for n in range(COUNT)])
    with pytest.raises(ValueError, match="split is ''; train, valid or test is needed"):
        DATASETS["table"](source)
    dataset = DATASETS["table"](source, skip_bad=True)
    assert splits_of(dataset) == {n: given[n] for n in range(COUNT) if n % 3} and len(dataset.left_out) == 20
    late = table(tmp_path, parquet, split=[None, *given[1:]], Odd=[*SMILING[:-1], 7])
    dataset = DATASETS["table"](late, skip_bad=True, kinds=["Odd=binary"])
    assert splits_of(dataset) == {n: given[n] for n in range(1, COUNT - 1)}


@pytest.mark.parametrize("parquet", [True, False])
@pytest.mark.parametrize("unknown", [lambda n: n % 3 == 0, lambda n: n >= 50, lambda n: n == 0])
def test_no_person_is_on_both_sides_and_who_is_unknown_stands_alone(tmp_path, parquet, unknown, caplog):
    person = [None if unknown(n) else f"person{n // 4}" for n in range(COUNT)]
    with caplog.at_level(logging.WARNING):
        splits = splits_of(DATASETS["table"](table(tmp_path, parquet, person=person), group="person"))
    sides = {name: {splits[n] for n in range(COUNT) if person[n] == name} for name in set(person) - {None}}
    assert all(len(those) == 1 for those in sides.values())
    assert f"{person.count(None)} of 60 records have no group" in caplog.text


def test_records_of_unknown_person_are_spread_over_the_splits(tmp_path):
    for number, word in enumerate((None, "NA", "nan", "")):
        source = table(tmp_path / str(number), False, person=[word] * COUNT)
        splits = list(splits_of(DATASETS["table"](source, group="person", attributes=["Smiling"])).values())
        assert set(splits) == {"train", "valid", "test"}


def test_persons_that_are_numbers_with_nulls_among_them_stay_whole(tmp_path):
    person = [None if n == 0 else float(n // 4) for n in range(COUNT)]
    text = [cell if n % 2 else f"{n // 4}" for n, cell in enumerate(person)]  # 3.0 and 3 in one CSV
    for parquet, cells in ((True, person), (False, text)):
        splits = splits_of(DATASETS["table"](table(tmp_path, parquet, person=cells), group="person"))
        assert all(len({splits[n] for n in range(4 * k, 4 * k + 4)}) == 1 for k in range(1, 15))


@pytest.mark.parametrize("parquet", [True, False])
def test_a_null_key_or_path_is_a_fault_of_its_row(tmp_path, parquet):
    source = table(tmp_path, parquet, id=[None if n == 3 else f"k{n}" for n in range(COUNT)])
    with pytest.raises(ValueError, match="no key in column id"):
        DATASETS["table"](source, key="id")
    dataset = DATASETS["table"](source, key="id", skip_bad=True)
    assert "None" not in dataset.keys and dataset.keys == [f"k{n}" for n in range(COUNT) if n != 3]
    source = table(tmp_path, parquet, path=[None if n == 3 else path for n, path in enumerate(PATHS)])
    assert len(DATASETS["table"](source, skip_bad=True)) == COUNT - 1


@pytest.mark.parametrize("word", ["None", "NA", "null", "<NA>", "-"])
def test_a_word_for_unknown_is_no_key_no_path_and_no_group(tmp_path, word, caplog):
    names = [word if n in (3, 4) else f"k{n}" for n in range(COUNT)]
    source = table(tmp_path, False, id=names, file=names)
    with pytest.raises(ValueError, match=f"line 5: no key in column id, which holds '{word}'"):
        DATASETS["table"](source, key="id", attributes=["Smiling"])
    assert len(DATASETS["table"](source, key="id", attributes=["Smiling"], skip_bad=True)) == COUNT - 2
    with pytest.raises(ValueError, match="line 5: no picture path in column file"):
        DATASETS["table"](source, path="file", attributes=["Smiling"])
    DATASETS["table"](source, group="id", attributes=["Smiling"])
    assert "2 of 60 records have no group" in caplog.text


def test_columns_of_a_parquet_dictionary_may_hold_nulls(tmp_path):
    def coded(*cells: str | None) -> pa.DictionaryArray:
        return pa.array([*cells, *("train" for _ in range(COUNT - len(cells)))]).dictionary_encode()

    source = table(tmp_path, True, split=coded("valid", None, "test"), hair=coded(None, "train", "red"))
    dataset = DATASETS["table"](source, skip_bad=True)
    assert splits_of(dataset) == {0: "valid", 2: "test", **dict.fromkeys(range(3, COUNT), "train")}
    assert dataset.labels[:2].tolist() == [[0, -1], [0, 0]] and "line 2: split is ''" in dataset.left_out[0].reason


@pytest.mark.parametrize("name", ["list.jsonl", "list.xlsx", "list.csv.gz"])
def test_a_table_in_another_format_is_told_the_way(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"path": "a.jpg"}')
    with pytest.raises(ValueError, match=f"{name} is no CSV or Parquet file; pandas reads it and writes one"):
        DATASETS["table"](tmp_path / name)


@pytest.mark.parametrize("parquet", [True, False])
def test_splits_of_celeba_that_came_as_broken_numbers_are_read(tmp_path, parquet):
    source = table(tmp_path, parquet, split=[float(n % 3) for n in range(COUNT)])
    assert splits_of(DATASETS["table"](source)) == {n: ("train", "valid", "test")[n % 3] for n in range(COUNT)}


UNKNOWN = ["NA", "N/A", "n.a.", "NULL", "null", "(null)", "None", "nan", "NaN", "<NA>", "#N/A", "#VALUE!", "\\N", "?", "-", "."]
UNKNOWN += ["unknown", "missing"]


@pytest.mark.parametrize("word", UNKNOWN)
def test_the_usual_words_for_unknown_are_unknown_and_said(word, caplog):
    with caplog.at_level(logging.WARNING):
        assert column("red", word, "blue") == ("k-way blue red", [1, -1, 0])
        assert column("1", "0", word) == ("binary", [1, 0, -1])
        assert column("0.5", word) == ("continuous", [0.5, -1])
    assert (f"{word!r} is taken for unknown (1 cells)" in caplog.text) == (word.lower() != "nan")
    assert column("x", word, kind=f"k-way:x,{word}") == (f"k-way x {word}", [0, 1])
    assert column("none", "full") == ("k-way full none", [1, 0])


def test_one_number_written_in_several_ways_is_one_number():
    assert column("1", "1.0", "2", "02", "+3", "3e0", "1,0") == ("k-way 1 2 3", [0, 0, 1, 1, 2, 2, 0])
    assert column("1.0", "0", "0.0", "1") == ("binary", [1, 0, 0, 1])
    assert column("0,5", "0,25", "1") == ("continuous", [0.5, 0.25, 1])
    assert column("1,5", "20", "", kind="continuous:0:20") == ("continuous", [pytest.approx(0.075), 1, -1])
    assert column("-1.0", "1.0", kind="binary:-1,1") == ("binary", [0, 1])
    assert column("01", "1", kind="k-way:01,1") == ("k-way 01 1", [0, 1])
    assert column("7.0", "8", kind="k-way:8,7") == ("k-way 8 7", [1, 0])


@pytest.mark.parametrize("cells", [["1,234", "5,678"], ["34%", "50%"], ["1 234", "2 000"], ["1.2.3", "1.2.4"], ["5", "1,234"]])
def test_what_looks_like_numbers_and_is_none_is_refused_with_the_flag_that_settles_it(cells):
    with pytest.raises(ValueError, match="--kind x=k-way"):
        column(*cells)
    assert column(*cells, kind="k-way")[0].startswith("k-way ")


@pytest.mark.parametrize(
    "cells, says, kind",
    [
        (["-2", "-1", "0", "1", "2"], "numbers from -2 to 2.*empty the cells that are unknown", "k-way:-2,-1,0,1,2"),
        (["0", "1", "-999"], "numbers from -999 to 1", "k-way:0,1,-999"),
        (["-1", "-0.5", "0.5"], "continuous:-1:0.5", "continuous:-1:0.5"),
        (["Male", "male", "female"], "differ in capitals alone", "k-way"),
        (["$5", "$6"], "may be read in two ways", "k-way"),
    ],
)
def test_cells_that_may_mean_two_things_are_refused_and_the_flag_settles_it(cells, says, kind):
    with pytest.raises(ValueError, match=says):
        column(*cells)
    assert -1 not in column(*cells, kind=kind)[1]


def test_a_negative_category_beside_an_unknown_one_needs_all_values():
    with pytest.raises(ValueError, match="-1, which means unknown, beside -2; .*k-way:-2,-1,"):
        column("-2", "-1", "0", kind="k-way")


def test_an_accent_apart_makes_no_other_word_and_no_other_person(tmp_path):
    assert column("caf\u00e9", "cafe\u0301", "x") == ("k-way caf\u00e9 x", [0, 0, 1])
    person = [("Jos\u00e9", "Jose\u0301")[n % 2] + str(n // 2) for n in range(COUNT)]
    splits = splits_of(DATASETS["table"](table(tmp_path, False, person=person), group="person", attributes=["Smiling"]))
    assert all(splits[n] == splits[n + 1] for n in range(0, COUNT, 2))


def test_thousands_are_never_read_as_decimals():
    made = Column("x", Kind.parse("x=continuous:0:5000")[1])
    made.add("1,234")
    assert "a number from 0 to 5000" in made.finish()[2][0]


def test_pandas_index_column_is_no_attribute(tmp_path):
    plain = DATASETS["table"](table(tmp_path, False))
    rows = (tmp_path / "list.csv").read_text().splitlines()
    for first in ("", "Unnamed: 0", ",Unnamed: 0", "Unnamed: 0.1,Unnamed: 0"):
        numbers = [",".join([str(n)] * (first.count(",") + 1)) for n in range(COUNT)]
        indexed = [f"{first},{rows[0]}", *map(",".join, zip(numbers, rows[1:]))]
        (tmp_path / "list.csv").write_text("\n".join(indexed))
        assert DATASETS["table"](tmp_path / "list.csv").attribute_list == plain.attribute_list
    source = table(tmp_path, True, **{f"__index_level_{level}__": list(range(COUNT)) for level in range(2)})
    assert DATASETS["table"](source).attribute_list == plain.attribute_list
    assert DATASETS["table"](source, key="__index_level_0__").keys[7] == "7"
    (tmp_path / "list.csv").write_text("path,,Smiling\na.jpg,1,1")
    with pytest.raises(ValueError, match="a column has no name"):
        DATASETS["table"](tmp_path / "list.csv")


@pytest.mark.parametrize("name", ["index", "level_0", "level_1", "Unnamed: 0"])
def test_other_index_columns_are_no_attribute_and_said(tmp_path, name, caplog):
    numbers = list(range(COUNT))
    tar(tmp_path / "a.tar", *(record(f"{n}", n, **{name: n}) for n in range(9)))
    with caplog.at_level(logging.INFO):
        for dataset in (
            DATASETS["table"](table(tmp_path, False, **{name: numbers})),
            DATASETS["table"](table(tmp_path, True, **{name: numbers})),
            DATASETS["wds"](tmp_path / "a.tar"),
        ):
            assert dataset.attributes.names == ("Smiling",)
    assert caplog.text.count(f"{name} is an index that pandas wrote") == 3
    source = table(tmp_path, True, **{name: SMILING})
    assert DATASETS["table"](source, attributes=[name]).attributes.names == (name,)
    assert name in DATASETS["table"](source, kinds=[f"{name}=binary"]).attributes.names


@pytest.mark.parametrize(
    "name, cells, says",
    [
        ("partition", [n % 3 for n in range(COUNT)], "--split-column partition"),
        ("usage", ["train" if n % 3 else "Test" for n in range(COUNT)], "--split-column usage"),
        ("id", list(range(100, 150)) + list(range(10)), "--key id"),
        ("tags", [[n % 2, 1] for n in range(COUNT)], "holds lists or fields"),
        ("boxes", [{"left": n % 2} for n in range(COUNT)], "holds lists or fields"),
    ],
)
def test_a_column_of_another_use_is_refused(tmp_path, name, cells, says):
    with pytest.raises(ValueError, match=f"column {name} .*{says}"):
        DATASETS["table"](table(tmp_path, True, **{name: cells}))
    tar(tmp_path / "a.tar", *(record(f"{n}", n, **{name: cells[n]} if n or name == "id" else {}) for n in range(COUNT)))
    with pytest.raises(ValueError, match=says):
        DATASETS["wds"](tmp_path / "a.tar")
    assert DATASETS["table"](table(tmp_path, True, **{name: cells}), attributes=["Smiling"]).attributes.names == ("Smiling",)


def test_excels_line_about_its_delimiter_is_obeyed(tmp_path):
    (tmp_path / "list.csv").write_text("\ufeffsep=;\npath;age\na.jpg;0,5\nb.jpg;x\n", encoding="utf-8")
    dataset = DATASETS["table"](tmp_path / "list.csv", kinds=["age=continuous"], skip_bad=True)
    assert dataset.labels.tolist() == [[0.5]] and "line 4" in dataset.left_out[0].reason


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.jpg").write_bytes(b"here")
    (tmp_path / "list.csv").write_text("path,Odd\n~/p/a.jpg,1\na.jpg,0\n")
    dataset = DATASETS["table"]("~/list.csv", images="~/p")
    assert [dataset.read(location) for location in dataset.locations] == [b"here", b"here"]


def test_an_attribute_that_training_cannot_teach_is_said_by_prepare_and_by_the_loader(tmp_path, caplog):
    for path in PATHS:
        plant(tmp_path, path)
    given = ["train"] * 50 + ["valid"] * 5 + ["test"] * 5
    columns = {"One": [1] * 60, "Nobody": [None] * 50 + [0, 1] * 5, "Age": [0.5] * 50 + [0.25] * 10, "Both": SMILING}
    columns["Hue"] = [("red", "blue")[n % 2] if n < 50 else "green" for n in range(60)]
    kinds = ["One=binary", "Nobody=binary"]
    dataset = DATASETS["table"](table(tmp_path, False, split=given, **columns), kinds=kinds)
    expected = [
        "One is 1 in every record", "Nobody is unknown in every record", "Age is 0.5 in every record",
        "no record has Hue = green",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        whole = prepare(dataset, tmp_path / "set", workers=1)
    assert [m for m in caplog.messages if "learnt" in m] == [f"train: {w}: nothing can be learnt of it" for w in expected]
    caplog.clear()
    for name in ("train", "valid"):
        part = whole.split(name)
        open_loader("pillow", "none", part, part.attributes.select(["Age", "Both"]), Preprocessing(8, "center"), seed=0)
    assert [m for m in caplog.messages if "learnt" in m] == ["train: Age is 0.5 in every record: nothing can be learnt of it"]


# --- folders ----------------------------------------------------------------------------------------------------------


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = encoded(grey(len(name)), "BMP" if name.endswith(".bmp") else "JPEG")
        (folder / name).write_bytes(data if not name.startswith("__") and "/._" not in name else b"\0\5\26\7mac")


def classes(dataset: Dataset) -> list[str]:
    return dataset.source["classes"]


def test_what_operating_systems_leave_is_no_class_and_no_split(tmp_path, caplog):
    pictures = [f"{kind}/{n}.jpg" for kind in ("cat", "dog") for n in range(3)]
    plant(tmp_path / "mac", *pictures, "__MACOSX/cat/._0.jpg", "cat/._1.jpg", "@eaDir/dog/0.jpg", "#recycle/0.jpg")
    (tmp_path / "mac/Thumbs.db").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        dataset = DATASETS["folders"](tmp_path / "mac")
    assert classes(dataset) == ["cat", "dog"] and len(dataset) == 6
    assert "5 hidden (" in caplog.text
    given = [f"{split}/{picture}" for split in ("train", "val", "test") for picture in pictures]
    plant(tmp_path / "zip", *given, "__MACOSX/train/._x.jpg", "annotations/cat/0.txt", "train/.cache/x/1.jpg")
    with caplog.at_level(logging.WARNING):
        dataset = DATASETS["folders"](tmp_path / "zip")
    assert classes(dataset) == ["cat", "dog"] and "no classes: annotations" in caplog.text
    assert [dataset.splits.count(split) for split in ("train", "valid", "test")] == [6, 6, 6]


def test_a_class_of_pictures_that_shards_do_not_hold_is_named(tmp_path):
    plant(tmp_path, *(f"cat/{n}.jpg" for n in range(3)), *(f"dog/{n}.bmp" for n in range(3)))
    with pytest.raises(ValueError, match=r"dog: shards hold JPEG, PNG and WebP, .* convert its pictures to PNG \(0.bmp\)"):
        DATASETS["folders"](tmp_path)
    with pytest.raises(ValueError, match="at least two folders"):
        DATASETS["folders"](tmp_path, skip_bad=True)
    plant(tmp_path, *(f"emu/{n}.jpg" for n in range(3)))
    assert classes(DATASETS["folders"](tmp_path, skip_bad=True)) == ["cat", "emu"]


def test_files_that_are_not_taken_are_counted_and_named(tmp_path, caplog):
    plant(tmp_path, *(f"{c}/{n}.jpg" for c in ("cat", "dog") for n in range(3)), "dog/a.bmp", "dog/b.bmp", "top.jpg")
    (tmp_path / "cat/notes.txt").write_text("x")
    (tmp_path / "cat/README").write_text("x")
    plant(tmp_path, "cat/photo.JFIF", "cat/photo2.JPG")
    with caplog.at_level(logging.WARNING):
        dataset = DATASETS["folders"](tmp_path)
    assert len(dataset) == 8
    for said in ("2 .bmp (dog/a.bmp)", "1 .jpg (top.jpg)", "1 .txt (cat/notes.txt)", "1 no extension (cat/README)"):
        assert said in caplog.text


def test_a_folder_beside_splits_is_named_and_numbers_are_classes(tmp_path):
    given = [f"{split}/{c}/{n}.jpg" for split in ("train", "test") for c in ("cat", "dog") for n in range(2)]
    plant(tmp_path / "more", *given, "unlabelled/0.jpg")
    with pytest.raises(ValueError, match="unlabelled: it holds pictures beside test, train"):
        DATASETS["folders"](tmp_path / "more")
    assert len(DATASETS["folders"](tmp_path / "more", skip_bad=True)) == 8
    plant(tmp_path / "numbers", *(f"{c}/{n}.jpg" for c in "01" for n in range(3)))
    assert classes(DATASETS["folders"](tmp_path / "numbers")) == ["0", "1"]
    plant(tmp_path / "deep", *(f"PetImages/{c}/{n}.jpg" for c in ("cat", "dog") for n in range(3)))
    with pytest.raises(ValueError, match=r"is it .*deep/PetImages that you mean\?"):
        DATASETS["folders"](tmp_path / "deep")


@pytest.mark.parametrize("form", ["Train{}", "{}_{}", "{}-{}"])
def test_domains_in_other_spellings_keep_their_splits(tmp_path, form):
    form = form.replace("Train{}", "{}{}")
    plant(tmp_path, *(f"{form.format(s, d)}/{n}.jpg" for s in ("Train", "Test") for d in "AB" for n in range(3)))
    dataset = DATASETS["folders"](tmp_path)
    assert classes(dataset) == ["A", "B"] and dataset.splits.count("test") == 6


def test_splits_inside_classes_are_splits_and_what_only_looks_like_one_is_refused(tmp_path):
    plant(tmp_path / "in", *(f"{c}/{s}/{n}.jpg" for s in ("train", "Test") for c in ("cat", "dog") for n in range(3)))
    dataset = DATASETS["folders"](tmp_path / "in")
    assert classes(dataset) == ["cat", "dog"]
    assert all(("Test" in r.location) == (r.split == "test") for r in records(dataset)) and len(dataset) == 12
    plant(tmp_path / "in", "cat/other/0.jpg", "dog/top.jpg")
    with pytest.raises(ValueError, match="cat/other/0.jpg: it lies beside the folders test, train"):
        DATASETS["folders"](tmp_path / "in")
    assert len(DATASETS["folders"](tmp_path / "in", skip_bad=True)) == 12
    plant(tmp_path / "coco", *(f"{s}2017/{c}/{n}.jpg" for s in ("train", "val") for c in ("cat", "dog") for n in range(3)))
    with pytest.raises(ValueError, match="train2017 and val2017 are called like splits; rename them"):
        DATASETS["folders"](tmp_path / "coco", skip_bad=True)
    plant(tmp_path / "capitals", *(f"{s}/{n}.jpg" for s in ("train/Cat", "train/dog", "test/cat") for n in range(3)))
    with pytest.raises(ValueError, match="classes differ in capitals alone, as Cat"):
        DATASETS["folders"](tmp_path / "capitals")
    plant(tmp_path / "places", *(f"{c}/{n}.jpg" for c in ("train_station", "harbour") for n in range(3)))
    assert classes(DATASETS["folders"](tmp_path / "places")) == ["harbour", "train_station"]


def test_a_zip_of_folders_is_told_the_way_and_read_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for name in (f"{c}/{s}/{n}.jpg" for s in ("train", "test") for c in ("cat", "dog") for n in range(3)):
            packed.writestr(name, encoded(grey(1), "JPEG"))
        packed.writestr("__MACOSX/cat/._0.jpg", b"x")
    with pytest.raises(ValueError, match="is no folder; name what lies in it as zip://::.*a.zip"):
        DATASETS["folders"](tmp_path / "a.zip")
    dataset = DATASETS["folders"](f"zip://::{tmp_path / 'a.zip'}")
    assert classes(dataset) == ["cat", "dog"] and dataset.splits.count("test") == 6
    assert seen(dataset.read(dataset.locations[0])) == 1


def test_linked_folders_are_followed_and_a_circle_ends(tmp_path):
    plant(tmp_path, *(f"set/{c}/{n}.jpg" for c in ("cat", "dog") for n in range(3)), "elsewhere/7.jpg", "emus/8.jpg")
    (tmp_path / "set/cat/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/emu").symlink_to(tmp_path / "emus")
    (tmp_path / "set/dog/loop").symlink_to(tmp_path / "set")
    dataset = DATASETS["folders"](tmp_path / "set")
    assert classes(dataset) == ["cat", "dog", "emu"] and len(dataset) == 8
    assert dataset.labels[dataset.locations.index("cat/more/7.jpg"), 0] == 0
    assert Place(str(tmp_path / "set")).files() == sorted(dataset.locations)
    (tmp_path / "set/alias").symlink_to(tmp_path / "set/cat")
    assert len([name for name in Place(str(tmp_path / "set")).files() if name.startswith(("alias/", "cat/"))]) == 8
    (tmp_path / "set/cat/itself").symlink_to("itself")
    assert "cat/itself" in Place(str(tmp_path / "set")).files()


def test_links_that_put_pictures_into_two_classes_are_refused(tmp_path):
    plant(tmp_path, *(f"{c}/{n}.jpg" for c in ("cat", "dog") for n in range(3)))
    (tmp_path / "cat/other").symlink_to(tmp_path / "dog")
    (tmp_path / "dog/other").symlink_to(tmp_path / "cat")
    with pytest.raises(ValueError, match="cat/other: it is a link to pictures that stand in dog already"):
        DATASETS["folders"](tmp_path)
    dataset = DATASETS["folders"](tmp_path, skip_bad=True)
    assert dataset.locations == [f"{c}/{n}.jpg" for c in ("cat", "dog") for n in range(3)]


# --- tars -------------------------------------------------------------------------------------------------------------


def record(name: str, number: int, **fields: object) -> list[tuple[str, bytes]]:
    data = {"Smiling": number % 2, **fields}
    return [(f"{name}.jpg", encoded(grey(number), "JPEG")), (f"{name}.json", json.dumps(data).encode())]


def tar(path: Path, *records: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tar_of(path, [member for members in records for member in members])


def test_tars_in_folders_called_like_splits_keep_their_splits(tmp_path):
    for split in ("train", "val", "test"):
        tar(tmp_path / f"set/{split}/00000.tar", *(record(f"{split}{n}", n) for n in range(10)))
    dataset = DATASETS["wds"](tmp_path / "set")
    assert all(r.key.startswith({"valid": "val"}.get(r.split, r.split)) for r in records(dataset)) and len(dataset) == 30
    tar(tmp_path / "set/extra/00000.tar", record("x", 1))
    with pytest.raises(ValueError, match="extra/00000.tar says no split and .* does; .*--split"):
        DATASETS["wds"](tmp_path / "set")
    from pipeline.data.datasets import Shares

    assert len(DATASETS["wds"](tmp_path / "set", shares=Shares())) == 31


@pytest.mark.parametrize("name", ["faces-{}-0000", "0000_{}", "{}/0000", "data/{}/part0/0000", "{}_256/0000"])
@pytest.mark.parametrize("valid", ["validation", "dev", "Val"])
def test_a_split_is_a_word_anywhere_in_a_tars_name(tmp_path, name, valid):
    for split in ("Training", valid, "testing"):
        tar(tmp_path / f"{name.format(split)}.tar", *(record(f"{split}{n}", n) for n in range(4)))
    assert {(record.key[0], record.split) for record in records(DATASETS["wds"](tmp_path))} == {
        ("T", "train"), (valid[0], "valid"), ("t", "test"),
    }  # fmt: skip
    tar(tmp_path / "my_train_test.tar", record("x", 1))
    with pytest.raises(ValueError, match="my_train_test.tar says train and test; rename it"):
        DATASETS["wds"](tmp_path)


def test_a_field_called_split_is_the_split_where_the_tars_say_none(tmp_path):
    members = [record(f"{n}", n, split=("train", "val", "test")[n % 3]) for n in range(9)]
    tar(tmp_path / "a.tar", *members)
    dataset = DATASETS["wds"](tmp_path)
    assert dataset.splits == ["train", "valid", "test"] * 3 and dataset.attributes.names == ("Smiling",)
    tar(tmp_path / "b.tar", record("x", 1, split="NA"))
    with pytest.raises(ValueError, match="record x: its JSON has no 'split'"):
        DATASETS["wds"](tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "train-a.tar")
    (tmp_path / "b.tar").rename(tmp_path / "val-b.tar")
    dataset = DATASETS["wds"](tmp_path)
    assert dataset.attributes.names == ("Smiling",) and dataset.splits.count("train") > 6


def test_a_field_that_the_first_records_lack_is_taken_and_unknown_there(tmp_path):
    tar(tmp_path / "a.tar", *(record(f"{n}", n, **({"Beard": n % 2} if n > 2 else {})) for n in range(10)))
    dataset = DATASETS["wds"](tmp_path)
    assert [entry["name"] for entry in dataset.attribute_list] == ["Smiling", "Beard"]
    assert dataset.labels[:, 1].tolist() == [-1, -1, -1, 1, 0, 1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="there is no field 'Bread'; there are: Beard, Smiling"):
        DATASETS["wds"](tmp_path, attributes=["Bread"])


def test_names_that_begin_anew_in_each_tar_are_told_apart_by_it(tmp_path):
    for number in range(3):
        tar(tmp_path / f"{number:05d}.tar", *(record(f"{n:06d}", 10 * number + n) for n in range(10)))
    dataset = DATASETS["wds"](tmp_path)
    assert len(dataset) == 30 and dataset.keys[12] == "00001__000002"
    assert [seen(dataset.read(location)) for location in dataset.locations] == list(range(30))
    tar(tmp_path / "twice.tar", record("a", 1), record("b", 2), record("a", 3))
    with pytest.raises(ValueError, match="'a' stands at twice.tar record a already"):
        DATASETS["wds"](tmp_path / "twice.tar")


def test_a_record_of_unknown_group_stands_alone_and_one_without_split_is_a_fault(tmp_path):
    groups = [None if n % 3 == 0 else f"p{n // 6}" for n in range(60)]
    members = [record(f"{n}", n, who=groups[n], part=None if n == 4 else "train") for n in range(60)]
    tar(tmp_path / "a.tar", *members)
    dataset = DATASETS["wds"](tmp_path, group="who", attributes=["Smiling"])
    sides: dict[str, set[str]] = {}
    for record_ in records(dataset):
        sides.setdefault(groups[int(record_.key)] or "unknown", set()).add(record_.split)
    assert len(sides.pop("unknown")) == 3 and all(len(those) == 1 for those in sides.values())
    with pytest.raises(ValueError, match="record 4: its JSON has no 'part'"):
        DATASETS["wds"](tmp_path, split="part")


def test_packed_tars_are_told_the_way(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as packed:
        for name, data in record("a", 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="a.tar.gz is packed, .* unpack it"):
        DATASETS["wds"](tmp_path)
    assert os.listdir(tmp_path) == ["a.tar.gz"]
