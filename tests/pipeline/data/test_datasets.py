"""Every way in: labels belong to pictures whatever the source, splits are stable, faults are named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import DATASETS, SPLITS, Dataset, Shares
from pipeline.data.datasets.columns import Column, Kind
from pipeline.data.datasets.record import key_from_name
from pipeline.data.datasets.source import Place
from pipeline.data.datasets.splits import assign
from pipeline.data.shards import ShardSet, prepare, verify
from pipeline.images import decode
from tests.pipeline.planted import records, write_celeba

COUNT = 30


def grey(value: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture that says its own number."""
    return Image.new("L", size, value)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def seen(data: bytes) -> int:
    return int(np.asarray(decode(data))[3, 3, 0])


def write_idx(path: Path, array: np.ndarray, pack: bool) -> None:
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.with_name(path.name + ".gz" * pack).write_bytes(gzip.compress(data, 1) if pack else data)


def write_mnist(folder: Path, pack: bool = True) -> Path:
    """Pictures whose grey level is 10 times their label plus 1."""
    folder.mkdir(parents=True)
    for part, count in (("train", 3 * COUNT), ("t10k", COUNT)):
        labels = np.arange(count) * 7 % 10
        pictures = np.broadcast_to((labels * 10 + 1)[:, None, None], (count, 28, 28))
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, pack)
        write_idx(folder / f"{part}-images-idx3-ubyte", pictures, pack)
    return folder


def write_domains(folder: Path) -> Path:
    """Grey levels below 100 are A."""
    for number in range(2 * COUNT):
        name = ("train", "train", "test")[number % 3] + "AB"[number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"n0{number} (1).jpg").write_bytes(encoded(grey(number + 100 * (number % 2)), "JPEG"))
    (folder / "trainA/notes.txt").write_text("no picture")
    return folder


def write_daynight(folder: Path, cameras: int = 6) -> Path:
    """Night is dark."""
    rows = ["path,label,camera,split"]
    for number in range(3 * COUNT):
        label = "night" if number % 2 else "day"
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.jpg").write_bytes(encoded(grey(20 if number % 2 else 220), "JPEG"))
        rows.append(f"{label}/{number}.jpg,{label},cam{number % cameras},{'test' if number % 5 == 0 else 'training'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


HEADER = ["path", "person", "Smiling", "Beard", "age"]


def table_rows() -> list[list[str]]:
    """The picture's grey level is its number; everything follows from it."""
    return [
        [f"p/{n:03d}.png", f"id{n % 7}", ("0", "1", "", "-1")[n % 4], ("none", "full", "moustache")[n % 3], str(n)]
        for n in range(COUNT)
    ]


def write_table(folder: Path, parquet: bool = False) -> Path:
    (folder / "p").mkdir(parents=True)
    for number in range(COUNT):
        (folder / f"p/{number:03d}.png").write_bytes(encoded(grey(number)))
    if parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = table_rows()
        columns = {name: [row[i] for row in rows] for i, name in enumerate(HEADER)}
        columns["Smiling"] = [int(cell) if cell else None for cell in columns["Smiling"]]
        columns["age"] = [float(cell) for cell in columns["age"]]
        pq.write_table(pa.table(columns), folder / "list.parquet")
        return folder / "list.parquet"
    with open(folder / "list.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([HEADER, *table_rows()])
    return folder / "list.csv"


def write_wds(folder: Path, form: str = "img2dataset") -> Path:
    """Records whose picture's grey level is their number, with the fields that img2dataset writes."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for n in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                fields = {"Smiling": n % 2, "age": n / 100, "Beard": ("none", "full", "moustache")[n % 3]}
                extra = {"caption": f"caption {n}", "url": "http://x", "key": f"{n:09d}", "status": "success"}
                bad = n == 11
                extra |= {"status": "failed_to_download", "width": None} if bad else {"width": 12, "sha256": f"{n}"}
                members = {"txt": b"a caption", "json": json.dumps({**extra, **fields}).encode()}
                for extension, data in (members if bad else {"jpg": encoded(grey(n), "JPEG"), **members}).items():
                    info = tarfile.TarInfo(f"{n:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


KINDS = ["age=continuous:0:100"]


def small(name: str, folder: Path) -> Dataset:
    """A tiny set of each name in DATASETS."""
    if name == "celeba":
        return DATASETS[name](write_celeba(folder, COUNT))
    made = {
        "mnist": lambda: DATASETS[name](write_mnist(folder / "x")),
        "digits": lambda: DATASETS[name](),
        "faces": lambda: DATASETS[name](folder / "x", count=COUNT, workers=1),
        "fruit": lambda: DATASETS[name](folder / "x", count=COUNT, workers=1),
        "folders": lambda: DATASETS[name](write_domains(folder / "x")),
        "daynight": lambda: DATASETS[name](write_daynight(folder / "x")),
        "table": lambda: DATASETS[name](write_table(folder / "x"), group="person", kinds=KINDS),
        "wds": lambda: DATASETS[name](write_wds(folder / "x")),
    }
    return made[name]()


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_set_has_records_that_read_and_pickles(name, tmp_path):
    dataset = small(name, tmp_path)
    again = pickle.loads(pickle.dumps(dataset))
    assert dataset.name == name and len(dataset) >= 20 and dataset.digest() == again.digest()
    for row in (0, len(dataset) // 2, len(dataset) - 1):
        assert min(decode(again.read(again.locations[row])).size) > 5
    attributes = dataset.attributes
    for attribute, labels in zip(attributes, dataset.labels.T):
        assert set(np.unique(labels)) <= {-1.0, *map(float, attribute.values)} or attribute.kind == "continuous"
    assert str(tmp_path) not in json.dumps(dataset.source), "dataset.json must not hold a path of this machine"


# --- mnist and digits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_mnist_labels_belong_to_their_pictures_which_stay_grey(tmp_path, pack):
    dataset = DATASETS["mnist"](write_mnist(tmp_path / "MNIST/raw", pack).parent.parent)
    for row in range(0, len(dataset), 7):
        data = dataset.read(dataset.locations[row])
        assert seen(data) == dataset.labels[row, 0] * 10 + 1
        assert Image.open(io.BytesIO(data)).mode == "L"
    assert dataset.attribute_list[0]["categories"] == [str(v) for v in range(10)]
    counts = {split: dataset.splits.count(split) for split in SPLITS}
    assert counts["test"] == COUNT and counts["train"] + counts["valid"] == 3 * COUNT and counts["valid"] > 2
    whole = prepare(dataset, tmp_path / "set", workers=1)
    assert verify(tmp_path / "set", workers=1).records == 4 * COUNT and whole.split("test").width[0] == 28


def damaged_mnist(folder: Path, damage: str) -> None:
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    data = bytearray(images.read_bytes())
    if damage == "cut short":
        del data[-100:]
    if damage == "too long":
        data += b"x"
    if damage == "giant count":
        data[4:8] = b"\xff\xff\xff\xff"
    if damage == "giant pictures":
        data[8:16] = b"\xff" * 8
    if damage == "another type":
        data[2] = 0x0D
    if damage == "another dimension":
        data[3] = 1
    if damage == "empty":
        data.clear()
    images.write_bytes(data)
    if damage == "fewer labels":
        write_idx(labels, np.zeros(4), False)
    if damage == "missing":
        labels.unlink()


@pytest.mark.parametrize(
    "damage",
    ["cut short", "too long", "giant count", "giant pictures", "another type", "another dimension", "empty",
     "fewer labels", "missing"],
)  # fmt: skip
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    folder = write_mnist(tmp_path / "x", False)
    damaged_mnist(folder, damage)
    with pytest.raises(ValueError, match="train-(images|labels)-idx"):
        DATASETS["mnist"](folder)


def test_a_small_gzip_that_swells_is_cut_off_at_what_it_declares(tmp_path):
    folder = write_mnist(tmp_path / "x")
    bomb = struct.pack(">BBBBI", 0, 0, 8, 1, 3 * COUNT) + bytes(50_000_000)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bomb, 9))
    with pytest.raises(ValueError, match="more bytes than that"):
        DATASETS["mnist"](folder)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bomb, 9)[:3000])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz"):
        DATASETS["mnist"](folder)


def test_digits_are_the_1797_of_scikit_learn():
    dataset = DATASETS["digits"]()
    assert len(dataset) == 1797 and np.bincount(dataset.labels[:, 0].astype(int)).min() == 174
    image = Image.open(io.BytesIO(dataset.read(dataset.locations[0])))
    assert image.size == (8, 8) and image.mode == "L" and np.asarray(image).max() > 230 and dataset.labels[0, 0] == 0


# --- folders and daynight ---------------------------------------------------------------------------------------------


def test_domains_make_a_binary_attribute_and_keep_their_splits(tmp_path):
    dataset = DATASETS["folders"](write_domains(tmp_path), names=("apple", "orange"))
    assert dataset.attribute_list == [{"name": "orange", "kind": "binary", "categories": []}]
    for record in records(dataset):
        assert record.labels[0] == (seen(dataset.read(record.location)) >= 100)
        assert record.split == "test" if record.location.startswith("test") else record.split in ("train", "valid")


@pytest.mark.parametrize("splits", [(), ("train", "val", "test")])
def test_class_folders_make_a_k_way_attribute(tmp_path, splits):
    for number, name in enumerate(["cat", "dog", "emu"] * 12):
        folder = tmp_path / (splits[number // 3 % 3] if splits else "") / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(grey(number)))
    dataset = DATASETS["folders"](tmp_path)
    assert dataset.attribute_list == [{"name": "class", "kind": "k-way", "categories": ["cat", "dog", "emu"]}]
    for record in records(dataset):
        number = seen(dataset.read(record.location))
        assert record.labels[0] == number % 3
        if splits:
            assert record.split == ("train", "valid", "test")[number // 3 % 3]


def test_a_folder_that_is_no_set_is_refused(tmp_path):
    for make, says in ((lambda: None, "at least two folders"), (lambda: (tmp_path / "one").mkdir(), "at least two")):
        make()
        with pytest.raises(ValueError, match=says):
            DATASETS["folders"](tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        DATASETS["folders"](tmp_path / "nowhere")
    (tmp_path / "two").mkdir()
    (tmp_path / "one/b.jpg").write_bytes(encoded(grey(1)))
    for name in ("a.jpg", "a.png"):
        (tmp_path / "two" / name).write_bytes(encoded(grey(1)))
    with pytest.raises(ValueError, match="already"):
        DATASETS["folders"](tmp_path)
    assert len(DATASETS["folders"](tmp_path, skip_bad=True).left_out) == 1


def test_no_camera_is_on_both_sides_and_night_is_dark(tmp_path):
    dataset = DATASETS["daynight"](write_daynight(tmp_path, cameras=30))
    camera_of = {r.key: int(r.location.partition("/")[2][:-4]) % 30 for r in records(dataset)}
    sides: dict[int, set[str]] = {}
    for record in records(dataset):
        sides.setdefault(camera_of[record.key], set()).add(record.split)
        assert record.labels[0] == (seen(dataset.read(record.location)) < 100)
    assert all(len(found) == 1 for found in sides.values()) and len(set(dataset.splits)) > 1
    assert dataset.attribute_list[0]["name"] == "Night" and dataset.attribute_list[0]["kind"] == "binary"


def test_without_cameras_daynight_keeps_its_splits_and_says_so(tmp_path, caplog):
    folder = write_daynight(tmp_path)
    lines = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()]
    (folder / "labels.csv").write_text("\n".join(",".join([row[0], row[1], row[3]]) for row in lines))
    with caplog.at_level(logging.WARNING):
        dataset = DATASETS["daynight"](folder)
    assert "no camera column" in caplog.text and dataset.splits.count("test") == 3 * COUNT // 5
    (folder / "labels.csv").unlink()
    tree = DATASETS["daynight"](folder)
    assert all(r.labels[0] == (seen(tree.read(r.location)) < 100) for r in records(tree))
    with pytest.raises(ValueError, match="no labels.csv"):
        DATASETS["daynight"](folder, camera="cam")


# --- table and wds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parquet", [False, True])
def test_a_table_gives_binary_k_way_and_continuous_labels_and_unknown_ones(tmp_path, parquet):
    dataset = DATASETS["table"](
        write_table(tmp_path, parquet), group="person", attributes=["Smiling", "Beard", "age"],
        kinds=[*KINDS, "Beard=k-way:none,moustache,full"],
    )  # fmt: skip
    assert [entry["kind"] for entry in dataset.attribute_list] == ["binary", "k-way", "continuous"]
    groups: dict[int, set[str]] = {}
    for record in records(dataset):
        number = seen(dataset.read(record.location))
        expected = [(0, 1, -1, -1)[number % 4], (0, 2, 1)[number % 3], number / 100]
        assert record.labels.tolist() == pytest.approx(expected)
        groups.setdefault(number % 7, set()).add(record.split)
    assert all(len(found) == 1 for found in groups.values())
    whole = prepare(dataset, tmp_path / "set", workers=1)
    assert whole.manifest.schema.field("age").type == "float" and whole.manifest.schema.field("Smiling").type == "int8"
    assert verify(tmp_path / "set", workers=1).records == COUNT


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("p/000.png,id,1,none", "line 32: 4 cells for 5 columns"),
        (",id,1,none,3", "line 32: no picture path"),
        ("p/000.png,id,1,none,3", "stands at list.csv line 2 already"),
        ("p/x.png,id,2,none,3", "Smiling is '2'; 0, 1 or an empty cell is needed"),
        ("p/x.png,id,1,beard,3", "Beard is 'beard'; none, full, moustache or"),
        ("p/x.png,id,1,none,300", "age is '300'; a number from 0 to 100"),
        ('p/x.png,"id,1,none,3', "after line"),
        ("p/x.png,id,1,none,\udcff", "not UTF-8"),
        ("p/x.png,id,1,none," + "9" * 2_000_000, "a line has more than"),
    ],
)
def test_a_wrong_row_is_named_and_skip_bad_leaves_it_out(tmp_path, line, says):
    path = write_table(tmp_path)
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\r\n")
    kinds = [*KINDS, "Smiling=binary", "Beard=k-way:none,full,moustache"]
    options = {"attributes": ["Smiling", "Beard", "age"], "kinds": kinds}
    with pytest.raises(ValueError) as error:
        DATASETS["table"](path, **options)
    assert says in str(error.value)
    if "--skip-bad" in str(error.value):
        dataset = DATASETS["table"](path, **options, skip_bad=True)
        assert len(dataset) == COUNT and len(dataset.left_out) == 1
        assert says.split(": ")[-1] in dataset.left_out[0].reason


def column(*cells: object, kind: str = "") -> tuple[str, list[float]]:
    made = Column("x", Kind.parse(f"x={kind}")[1] if kind else None)
    for cell in cells:
        made.add(cell)
    entry, labels, faults = made.finish()
    assert not faults
    return entry["kind"] + "".join(f" {c}" for c in entry["categories"]), labels.tolist()


def test_the_kind_of_a_column_follows_from_its_cells():
    assert column("1", "0", "", "-1") == ("binary", [1, 0, -1, -1])
    assert column(1, 0, None, -1) == ("binary", [1, 0, -1, -1])
    assert column(1.0, 0.0, float("nan")) == ("binary", [1, 0, -1])
    assert column(True, False) == ("binary", [1, 0])
    assert column("yes", "No", "") == ("binary", [1, 0, -1])
    assert column("false", "true") == ("binary", [0, 1])
    assert column("0.5", "0", "1") == ("continuous", [0.5, 0, 1])
    assert column("3", "10", "-1", "2") == ("k-way 2 3 10", [1, 2, -1, 0])
    assert column("male", "female") == ("k-way female male", [1, 0])
    assert column("-1", "1", kind="binary:-1,1") == ("binary", [0, 1])
    assert column("-5", "0", "5", "", kind="continuous:-5:5") == ("continuous", [0, 0.5, 1, -1])
    assert column("b", "a", kind="k-way:c,b,a") == ("k-way c b a", [1, 2])


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (["1", "-1"], "binary:-1,1"),
        (["0", "1", "x"], "'x' among numbers"),
        (["17", "3.5"], "continuous:3.5:17"),
        ([str(n) for n in range(99)], "continuous:0:98"),
        ([f"word {n}" for n in range(99)], "99 different values"),
        (["same", "same"], "1 different values"),
        (["", "-1"], "no known value"),
    ],
)
def test_a_column_that_could_mean_two_things_is_refused_with_the_words_that_settle_it(cells, says):
    with pytest.raises(ValueError) as error:
        column(*cells)
    assert says in str(error.value)


WRONG_KINDS = ["x", "=binary", "x=bin", "x=continuous:1:0", "x=binary:a", "x=k-way:a,a", "x=k-way:a"]


@pytest.mark.parametrize("text", WRONG_KINDS)
def test_a_kind_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="--kind is"):
        Kind.parse(text)


def test_img2datasets_tars_are_read_where_they_lie(tmp_path):
    dataset = DATASETS["wds"](write_wds(tmp_path / "x"))
    assert [entry["name"] for entry in dataset.attribute_list] == ["Smiling", "age", "Beard"]
    assert len(dataset) == COUNT - 1, "what was never fetched is no record"
    for record in records(dataset):
        number = int(record.key)
        assert seen(dataset.read(record.location)) == number
        assert record.labels.tolist() == pytest.approx([number % 2, number / 100, (2, 0, 1)[number % 3]])


def test_a_shard_set_of_ours_is_a_source_too(tmp_path):
    first = prepare(small("mnist", tmp_path), tmp_path / "set", workers=1)
    again = prepare(DATASETS["wds"](tmp_path / "set"), tmp_path / "again", workers=1)
    assert {s: again.info["splits"][s]["records"] for s in SPLITS} == {
        s: first.info["splits"][s]["records"] for s in SPLITS
    }
    assert again.digest == first.digest


def tar_of(path: Path, members: list[tuple[str, bytes]], **fields: object) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_whose_names_climb_out_writes_nothing_outside(tmp_path):
    picture, labels = encoded(grey(9), "JPEG"), b'{"Smiling": 1, "Odd": 0}'
    parts = (("jpg", picture), ("json", labels))
    members = [(f"{name}.{kind}", data) for name in ("../../evil", "/etc/x y") for kind, data in parts]
    tar_of(tmp_path / "a.tar", members)
    dataset = DATASETS["wds"](tmp_path / "a.tar")
    before = {p for p in tmp_path.parent.rglob("*") if tmp_path / "set" not in p.parents}
    prepare(dataset, tmp_path / "set", workers=1)
    assert {p for p in tmp_path.parent.rglob("*") if tmp_path / "set" not in p.parents} - before == {tmp_path / "set"}
    assert all("/" not in key and "." not in key for key in dataset.keys) and len(set(dataset.keys)) == 2


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.jpg", b"x")], "a.tar record a: no JSON"),
        ([("a.json", b"{}"), ("b.json", b"{}")], "no picture"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "it holds list"),
        ([("a.jpg", b"x"), ("a.json", b"{" * 9)], "JSON is damaged"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.json", b"{}")], "two pictures"),
        ([("a.jpg", b"x"), ("a.json", b'{"url": "u"}')], "no field is left"),
        ([("a.txt", b"x")], "no picture"),
        ([("a", b"x")], "holds no record"),
    ],
)
def test_a_wrong_record_of_a_tar_is_named(tmp_path, members, says):
    with pytest.raises(ValueError, match=says):
        DATASETS["wds"](tar_of(tmp_path / "a.tar", members))


def test_a_tar_that_was_cut_short_or_says_giant_sizes_is_named(tmp_path):
    whole = (write_wds(tmp_path / "x") / "00000.tar").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:10_000] + b"\xff" * 9000 + whole[19_000:]):
        (tmp_path / "cut.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match="cut.tar: damaged after record"):
            DATASETS["wds"](tmp_path / "cut.tar")
        assert 0 < len(DATASETS["wds"](tmp_path / "cut.tar", skip_bad=True)) < COUNT // 2
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "giant.tar").write_bytes(info.tobuf() + bytes(10_240))
    with pytest.raises(ValueError, match="giant.tar: damaged"):
        DATASETS["wds"](tmp_path / "giant.tar")


# --- splits, keys, places ---------------------------------------------------------------------------------------------


def test_a_hash_split_is_stable_when_the_set_grows_and_near_its_shares():
    names = [f"key{n}" for n in range(20_000)]
    first, _ = assign(names[:5000], shares=Shares((80, 10, 10)))
    grown, _ = assign(names[::-1], shares=Shares((80, 10, 10)))
    assert grown[::-1][:5000] == first
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1)):
        assert abs(grown.count(split) / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_what_a_set_does_not_give_is_taken_from_train_and_said():
    given = ["train"] * 1000 + ["test"] * 100
    splits, how = assign([str(n) for n in range(1100)], given=given)
    assert splits[1000:] == given[1000:] and 60 < splits.count("valid") < 140 and "no valid" in how
    assert assign(["a", "b", "c"], given=["train", "valid", "test"]) == (["train", "valid", "test"], "as given")


@pytest.mark.parametrize("text", ["80/10", "80/10/11", "a/b/c", "110/-5/-5", ""])
def test_shares_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="as 80/10/10"):
        Shares.parse(text)


def test_keys_are_plain_stable_and_apart():
    assert key_from_name("000001.jpg") == "000001" and key_from_name("day/7.png") == "day__7"
    odd = ["a b.jpg", "a-b.jpg", "a/b__c.jpg", "a__b/c.jpg", "../x.jpg", "ü.jpg", "/abs/x.jpg", "x" * 200 + ".jpg"]
    keys = [key_from_name(name) for name in odd]
    assert len(set(keys)) == len(odd) and all(key.isascii() and len(key) <= 90 for key in keys)


def test_a_source_may_lie_at_any_address(tmp_path):
    """An archive, and memory: two file systems that need no network."""
    import fsspec

    write_daynight(tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted((tmp_path / "x").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "x"))
    local = DATASETS["daynight"](tmp_path / "x")
    for address in (f"zip://::{tmp_path}/x.zip", (tmp_path / "x").as_uri()):
        remote = DATASETS["daynight"](address)
        assert remote.digest() == local.digest()
        assert pickle.loads(pickle.dumps(remote)).read(remote.locations[5]) == local.read(local.locations[5])
    memory = fsspec.filesystem("memory")
    memory.put(str(write_wds(tmp_path / "tars")), "/tars", recursive=True)
    found = DATASETS["wds"]("memory://tars")
    assert found.digest() == DATASETS["wds"](tmp_path / "tars").digest()
    assert found.read(found.locations[3]) == encoded(grey(int(found.keys[3])), "JPEG")
    assert isinstance(prepare(found, tmp_path / "set", workers=1), ShardSet)


def test_a_remote_answer_is_asked_for_again_and_then_named(tmp_path, monkeypatch):
    from pipeline.data.datasets import source

    monkeypatch.setattr(source, "FIRST_WAIT_SECONDS", 0.001)
    tries = []

    def failing(times: int):
        def question(system: object, path: str) -> str:
            tries.append(path)
            if len(tries) <= times:
                raise RuntimeError("503")
            return "answer"

        return question

    assert Place("memory://a")._ask(failing(2)) == "answer" and len(tries) == 3
    tries.clear()
    with pytest.raises(OSError, match="memory://a cannot be read, tried 6 times: 503"):
        Place("memory://a")._ask(failing(9))
    with pytest.raises(OSError):
        Place("memory://nowhere/x").read_bytes()
    assert not Place("memory://nowhere").is_file() and not Place("nosuch").is_dir()
    with pytest.raises(ValueError, match="nosuch://x cannot be opened"):
        DATASETS["wds"]("nosuch://x")
