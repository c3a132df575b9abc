"""CelebA as it is published: an annotation file, a partition file, a folder of 178x218 JPEGs.

`list_attr_celeba.txt`: the number of rows; the attribute names; a picture's name and 1 or -1 for each attribute. Lines
end in CRLF or LF, the header has a trailing blank, columns are parted by runs of blanks. `list_eval_partition.txt`:
a picture's name and 0 (train), 1 (valid) or 2 (test). The files may lie side by side, as most tools expect them, or in
the folders Anno/, Eval/ and Img/ of the official download.

A file of k-way attributes in the same spirit (`kway`) may stand beside them: its header names the values of each
attribute, `Beard:none,moustache,beard`, and its rows hold their numbers.

Source: Liu et al. 2015, "Deep Learning Face Attributes in the Wild", mmlab.ie.cuhk.edu.hk/projects/CelebA.html.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np

from pipeline.data.datasets.record import Dataset, Faults, LeftOut, key_fault
from pipeline.data.datasets.source import Place, Reader

ANNOTATION = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")
IMAGES = ("img_align_celeba", "Img/img_align_celeba")
_SPLIT_OF = {"0": "train", "1": "valid", "2": "test"}
_BINARY = {"1": 1, "-1": 0}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Table:
    """An annotation file: its attributes, and for each key the line and the labels."""

    attribute_list: list[dict[str, Any]]
    rows: dict[str, tuple[int, tuple[int, ...]]]


def read_celeba(
    source: PathLike[str] | str,
    *,
    skip_bad: bool = False,
    name: str = "celeba",
    origin: dict[str, Any] | None = None,
    kway: str | None = None,
) -> Dataset:
    """The index of a CelebA folder; pictures are read later, by whoever writes shards.

    Args:
        source: the folder.
        skip_bad: leave out what is wrong and list it, instead of raising at the first fault.
        name: of the set, for another set in the same file format.
        origin: what dataset.json says of the source; by default the digests of the annotation files.
        kway: name of a file of k-way attributes beside the annotation.

    Raises:
        ValueError: a file is missing; an annotation stops short of its own count; a row has too few or too many values,
            or one that is neither 1 nor -1; a key stands twice, is no plain name, or has no partition. The message
            names file and line.
    """
    source = Place(fspath(source))
    images = _find(source, IMAGES, "folder of pictures", Place.is_dir)
    annotation = _find(source, ANNOTATION, "annotation file", Place.is_file)
    partition = _find(source, PARTITION, "partition file", Place.is_file)
    faults = Faults(skip_bad)

    files = [annotation, partition]
    table = _read_table(annotation, _binary_attributes, faults)
    splits = _read_partition(partition, faults)
    extra = _Table([], {})
    if kway:
        files.append(annotation.with_name(kway))
        extra = _read_table(files[-1], _kway_attributes, faults)

    keys, locations, labels, places, of = [], [], [], [], []
    for file_name, (line, values) in table.rows.items():
        key, place = file_name[:-4], f"{annotation.name} line {line}"
        if file_name not in splits:
            faults.add(key, place, f"{file_name} has no row in {partition.name}")
        elif kway and file_name not in extra.rows:
            faults.add(key, place, f"{file_name} has no row in {kway}")
        else:
            keys.append(key)
            locations.append(file_name)
            labels.append(values + extra.rows[file_name][1] if kway else values)
            places.append(place)
            of.append(splits[file_name])
    _missing_rows(splits, table, annotation, partition, faults)

    attribute_list = table.attribute_list + extra.attribute_list
    return Dataset(
        name=name,
        source=origin or {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        attribute_list=attribute_list,
        keys=keys,
        splits=of,
        locations=locations,
        labels=np.array(labels, np.float32).reshape(len(keys), len(attribute_list)),
        places=places,
        read=Reader(images),
        left_out=faults.left_out,
    )


def _find(source: Place, candidates: tuple[str, ...], what: str, exists: Callable[[Place], bool]) -> Place:
    for candidate in candidates:
        if exists(source / candidate):
            return source / candidate
    hint = ""
    if what == "folder of pictures" and any((source / f"{name}.zip").is_file() for name in candidates):
        hint = "; img_align_celeba.zip lies there: unzip it first"
    elif not source.is_dir():
        hint = "; there is no such folder"
    raise ValueError(f"{source} has no {what} {' or '.join(candidates)}{hint}")


def _lines(path: Place) -> list[str]:
    """The lines without their ends; trailing empty lines are dropped.

    Raises:
        ValueError: a byte is not ASCII; names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    data = path.read_bytes()
    if not data.isascii():
        line = next(number for number, part in enumerate(data.split(b"\n"), 1) if not part.isascii())
        raise ValueError(f"{path.name} line {line}: a byte is not ASCII; the file is damaged, fetch it again")
    return data.decode("ascii").rstrip().split("\n")


def _binary_attributes(header: list[str]) -> list[tuple[dict[str, Any], dict[str, int]]]:
    return [({"name": name, "kind": "binary", "categories": []}, _BINARY) for name in header]


def _kway_attributes(header: list[str]) -> list[tuple[dict[str, Any], dict[str, int]]]:
    out = []
    for entry in header:
        name, _, values = entry.partition(":")
        categories = values.split(",")
        if not name or len(set(categories)) < 2 or len(set(categories)) < len(categories):
            raise ValueError(f"{entry!r} does not name an attribute and at least two values, as Beard:none,moustache")
        out.append(
            ({"name": name, "kind": "k-way", "categories": categories}, {str(v): v for v in range(len(categories))})
        )
    return out


def _read_table(
    path: Place, attributes_of: Callable[[list[str]], list[tuple[dict[str, Any], dict[str, int]]]], faults: Faults
) -> _Table:
    """An annotation file. `attributes_of` turns its header into attributes and the meaning of their values."""
    lines = _lines(path)
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise ValueError(f"{path.name} line 1: {lines[0].strip()[:40]!r} is not the number of pictures")
    header = lines[1].split()
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice:
        raise ValueError(
            f"{path.name} line 2: {f'attribute {twice[0]!r} stands twice' if twice else 'no attribute names'}"
        )
    try:
        columns = attributes_of(header)
    except ValueError as error:
        raise ValueError(f"{path.name} line 2: {error}") from error
    meanings = [meaning for _, meaning in columns]

    count, found = int(lines[0]), len(lines) - 2
    if found != count:
        what = "stops short" if found < count else "goes on"
        faults.add(
            None,
            f"{path.name} line {len(lines)}",
            f"the file {what}: line 1 announces {count:,} rows, {found:,} follow",
        )
    rows: dict[str, tuple[int, tuple[int, ...]]] = {}
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        try:
            labels = tuple([meaning[value] for meaning, value in zip(meanings, values, strict=True)])
            fault = None
        except (KeyError, ValueError):
            labels, fault = (), _row_fault(header, meanings, values)
        fault = fault or _name_fault(name)
        if not fault and name in rows:
            fault = f"{name} stands in line {rows[name][0]} already"
        if fault:
            faults.add(name.removesuffix(".jpg"), f"{path.name} line {number}", fault)
        else:
            rows[name] = number, labels
    return _Table([attribute for attribute, _ in columns], rows)


def _row_fault(header: list[str], meanings: list[dict[str, int]], values: list[str]) -> str:
    if len(values) != len(header):
        return f"{len(values)} values for {len(header)} attributes"
    name, value, meaning = next((n, v, m) for n, v, m in zip(header, values, meanings) if v not in m)
    return f"{name.partition(':')[0]} is {value!r}; {' or '.join(meaning)} is needed"


def _name_fault(name: str) -> str | None:
    if not name.endswith(".jpg"):
        return f"{name!r} is not the name of a .jpg picture"
    reason = key_fault(name[:-4])
    return f"{name[:-4]!r} {reason}" if reason else None


def _read_partition(path: Place, faults: Faults) -> dict[str, str]:
    """Picture name to split."""
    out: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        name, *values = line.split() or [""]
        fault = None
        if len(values) != 1 or values[0] not in _SPLIT_OF:
            fault = f"partition of {name!r} is {' '.join(values)!r}; 0 (train), 1 (valid) or 2 (test) is needed"
        elif name in out:
            fault = f"{name} stands in line {lines[name]} already"
        if fault:
            faults.add(name.removesuffix(".jpg"), f"{path.name} line {number}", fault)
        else:
            out[name], lines[name] = _SPLIT_OF[values[0]], number
    return out


def _missing_rows(splits: dict[str, str], table: _Table, annotation: Place, partition: Place, faults: Faults) -> None:
    """Pictures with a partition and no labels: listed when skipping, else only said: they are no part of the set."""
    names = [name for name in splits if name not in table.rows]
    if names and faults.skip:
        faults.left_out += [
            LeftOut(name[:-4], f"{partition.name}: {name} has no row in {annotation.name}") for name in names
        ]
    elif names:
        logger.warning("%s names %d pictures that have no row in %s", partition.name, len(names), annotation.name)
