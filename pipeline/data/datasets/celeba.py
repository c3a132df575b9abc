"""CelebA as it is published, and its relatives: Kaggle's CSVs, the aligned PNGs, labels of 0 and 1, CelebAMask-HQ.

`list_attr_celeba.txt`: the number of rows; the attribute names; a picture's name and 1 or -1 for each attribute. Lines
end in CRLF or LF, the header has a trailing blank, columns are parted by runs of blanks. `list_eval_partition.txt`:
a picture's name and 0 (train), 1 (valid) or 2 (test). The files may lie side by side, as most tools expect them, or in
the folders Anno/, Eval/ and Img/ of the official download. The CSVs have a header and no number of rows. CelebAMask-HQ
gives no splits.

Source: Liu et al. 2015, "Deep Learning Face Attributes in the Wild", mmlab.ie.cuhk.edu.hk/projects/CelebA.html.
"""

import csv
import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike, fspath
from typing import Any

from pipeline.data.datasets.index import Index
from pipeline.data.datasets.record import Dataset, LeftOut, key_fault
from pipeline.data.datasets.source import Place, read_in

MASK_HQ = "CelebAMask-HQ-attribute-anno.txt"
ANNOTATION = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt", "list_attr_celeba.csv", MASK_HQ)
PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv")
IMAGES = ("img_align_celeba", "Img/img_align_celeba", "img_align_celeba_png", "Img/img_align_celeba_png", "CelebA-HQ-img")
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_SPLIT_OF = {"0": "train", "1": "valid", "2": "test"}

logger = logging.getLogger(__name__)


def read_celeba(
    source: PathLike[str] | str, *, skip_bad: bool = False, name: str = "celeba", origin: dict[str, Any] | None = None
) -> Dataset:
    """The index of a CelebA folder, of which no picture is read yet. name, origin: of another set in the same file format.

    Raises ValueError where a file is missing or damaged, or a row is wrong, unless `skip_bad`.
    """
    source = Place(fspath(source))
    images = _find(source, IMAGES, "folder of pictures", Place.is_dir)
    if (images / IMAGES[0]).is_dir():  # as Kaggle packs it
        images = images / IMAGES[0]
    annotation, index = _find(source, ANNOTATION, "annotation file", Place.is_file), Index(skip_bad)
    partition = None if annotation.name == MASK_HQ else _find(source, PARTITION, "partition file", Place.is_file)
    split_of = _read_partition(partition, index) if partition else {}
    names, labels = _read_annotation(annotation, partition, split_of, index)
    if partition:
        _tell_missing(split_of, annotation, partition, index)
    index.locations = _locations(images, index.locations)
    files = [annotation, partition] if partition else [annotation]
    origin = origin or {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    attribute_list = [{"name": name, "kind": "binary", "categories": []} for name in names]
    dataset = index.dataset(name, origin, attribute_list, labels, partial(read_in, images))
    if dataset.source["split"] == "as given":
        del dataset.source["split"]
    return dataset


def _find(source: Place, candidates: tuple[str, ...], what: str, exists: Callable[[Place], bool]) -> Place:
    if found := next((source / candidate for candidate in candidates if exists(source / candidate)), None):
        return found
    hint = ""
    if what == "folder of pictures" and any((source / f"{name}.zip").is_file() for name in candidates):
        hint = "; img_align_celeba.zip lies there: unzip it first"
    elif what == "partition file":
        hint = "; without one, 'fader prepare table' reads a CSV of pictures and labels, and splits it"
    elif not source.is_dir():
        hint = "; there is no such folder"
    raise ValueError(f"{source} has no {what} {' or '.join(candidates)}{hint}")


def _lines(path: Place) -> list[list[str]]:
    """The cells of each line; trailing empty lines are dropped."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # what some editors put before a text
    if not data.isascii():
        line = next(number for number, part in enumerate(data.split(b"\n"), 1) if not part.isascii())
        raise ValueError(f"{path.name} line {line}: a byte is not ASCII; the file is damaged, fetch it again")
    lines = data.decode("ascii").rstrip().split("\n")
    if not _is_csv(path):
        return [line.split() for line in lines]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))]
    first = next((at for at, cell in enumerate(rows[1]) if _key(cell)), 0) if len(rows) > 1 else 0
    return [row[first:] for row in rows]  # without the index columns that pandas wrote


def _is_csv(path: Place) -> bool:
    return path.name.endswith(".csv")


def _read_annotation(
    path: Place, partition: Place | None, split_of: dict[str, str], index: Index
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Put the rows into the index; return the attributes' names, and the labels of each record that was taken."""
    lines = _lines(path)
    head = 1 if _is_csv(path) else 2
    if head == 2 and (len(lines) < 2 or len(lines[0]) != 1 or not lines[0][0].isdigit()):
        raise ValueError(f"{path.name} line 1: {' '.join(lines[0])[:40]!r} is not the number of pictures")
    names = lines[head - 1][1:] if head == 1 else lines[1]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        what = f"attribute {twice[0]!r} stands twice" if twice else "no attribute names"
        raise ValueError(f"{path.name} line {head}: {what}")
    count = len(lines) - head
    if head == 2 and int(lines[0][0]) != count:
        what = "stops short" if count < int(lines[0][0]) else "goes on"
        reason = f"the file {what}: line 1 announces {int(lines[0][0]):,} rows, {count:,} follow"
        index.fault(None, f"{path.name} line {len(lines)}", reason)
    values = {value for cells in lines[head:] for value in cells[1:]}
    absent = "0" if "0" in values and "-1" not in values else "-1"
    meaning, labels = {"1": 1, absent: 0}, []
    for number, cells in enumerate(lines[head:], head + 1):
        name, *values = cells or [""]
        key, fault = _key(name), None
        if len(values) != len(names):
            fault = f"{len(values)} values for {len(names)} attributes"
        elif not all(map(meaning.__contains__, values)):
            wrong = next(pair for pair in zip(names, values) if pair[1] not in meaning)
            fault = f"{wrong[0]} is {wrong[1]!r}; 1 or {absent} is needed ('fader prepare table' reads other words, from a CSV)"
        elif key is None:
            fault = f"{name!r} is not the name of a .jpg or .png picture"
        elif partition and key not in split_of and not key_fault(key):
            fault = f"{name} has no row in {partition.name}"
        place = f"{path.name} line {number}"
        if fault or key is None:
            index.fault(key or name, place, str(fault))
        elif index.add(key, name, place, split_of.get(key)):
            labels.append(tuple(map(meaning.__getitem__, values)))
    return names, labels


def _key(name: str) -> str | None:
    """The key of a picture's name; None where it is the name of something else."""
    key, _, extension = name.rpartition(".")
    return key if f".{extension.lower()}" in _EXTENSIONS else None


def _read_partition(path: Place, index: Index) -> dict[str, str]:
    splits: dict[str, str] = {}
    lines: dict[str, int] = {}
    head = 1 if _is_csv(path) else 0
    for number, cells in enumerate(_lines(path)[head:], head + 1):
        name, *values = cells or [""]
        key, fault = _key(name) or name, None
        if len(values) != 1 or values[0] not in _SPLIT_OF:
            fault = f"partition of {name!r} is {' '.join(values)!r}; 0 (train), 1 (valid) or 2 (test) is needed"
        elif key in splits:
            fault = f"{name} stands in line {lines[key]} already"
        if fault:
            index.fault(key, f"{path.name} line {number}", fault)
        else:
            splits[key], lines[key] = _SPLIT_OF[values[0]], number
    return splits


def _tell_missing(splits: Iterable[str], annotation: Place, partition: Place, index: Index) -> None:
    """List pictures with a partition and no labels when skipping; else log how many there are. They are no part of the set."""
    known = {*index.keys}
    keys = [key for key in splits if key not in known]
    if keys and index.skip_bad:
        index.left_out += [LeftOut(key, f"{partition.name}: {key} has no row in {annotation.name}") for key in keys]
    elif keys:
        logger.warning("%s names %d pictures that have no row in %s", partition.name, len(keys), annotation.name)


def _locations(images: Place, names: list[str]) -> list[str]:
    """File names of the pictures, with the extension that the first of them has in the folder."""
    if not names or (images / names[0]).is_file():
        return names
    stem = names[0].rpartition(".")[0]
    own = next((extension for extension in _EXTENSIONS if (images / f"{stem}{extension}").is_file()), None)
    return [f"{name.rpartition('.')[0]}{own}" for name in names] if own else names
