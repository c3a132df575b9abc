"""WebDataset tars that exist already: a picture and a JSON file a record, as img2dataset and others write them.

The tars are not unpacked: the index says where each picture's bytes lie in them.
"""

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.data.datasets.columns import Column, Kind, finished, is_attribute, is_unknown, text_of
from pipeline.data.datasets.index import Index
from pipeline.data.datasets.record import Dataset, key_fault, key_from_name
from pipeline.data.datasets.source import PICTURES, Place, describe_missing, is_litter
from pipeline.data.datasets.splits import NAMES, Shares

IMG2DATASET = (
    "caption url key status error_message width height original_width original_height exif sha256 md5 shard_id "
    "similarity hash punsafe pwatermark aesthetic face_bboxes"
).split()
"""Fields that img2dataset writes by itself; attributes are what stands beside them."""
_LARGEST_JSON, _BLOCK = 16 << 20, 512
_DAMAGE = (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError, IndexError)

logger = logging.getLogger(__name__)


def read_in_tar(folder: Place, location: str) -> bytes:
    """The picture at `OFFSET SIZE TAR`."""
    offset, size, tar = location.split(" ", 2)
    data = (folder / tar).read_part(int(offset), int(size))
    if len(data) != int(size):
        raise ValueError(f"{tar} ends before byte {int(offset) + int(size):,}")
    return data


@dataclass
class _Sample:
    name: str
    picture: tuple[int, int] | None = None
    fields: dict[str, Any] | None = None
    fault: str | None = None


def read_wds(
    source: os.PathLike[str] | str, *, key: str | None = None, split: str | None = None, group: str | None = None,
    attributes: Sequence[str] = (), kinds: Sequence[str] = (), shares: Shares | None = None, skip_bad: bool = False,
    name: str = "wds",
) -> Dataset:
    """The index of a folder of tars, or of one tar.

    Splits are what the field `split` says, else what the tars' names or folders say (faces-train-000.tar, train/000.tar),
    else a field of the first record that is called "split", else 80/10/10 by a hash. Where names of records begin anew in
    each tar, the tar's name is part of the key. key, group: fields, too. attributes: fields to take, by default all but
    img2dataset's. kinds: see `columns.Kind`. What img2dataset failed to fetch is left out.
    """
    source = Place(os.fspath(source))
    folder, tars = (source.parent, [source.name]) if source.is_file() else (source, _tars(source))
    split_of = {} if split or shares else _splits_of(source, tars)
    said = dict(map(Kind.parse, kinds))
    index = Index(skip_bad, grouped=bool(group))
    columns = [Column(field, said.get(field, said.get("*"))) for field in attributes]
    fields = dict.fromkeys([*IMG2DATASET, key, group])  # seen so far, of all records
    seen: set[str] = set()
    names: list[tuple[str, str]] = []  # tar and name of each record
    for tar in tars:
        for sample in _samples(folder / tar, tar, index):
            place = f"{tar} record {sample.name[:100]}"
            if sample.picture is None and (sample.fields or {}).get("status", "success") != "success":
                continue
            if sample.fields and not seen:
                own = next((field for field in sample.fields if field.lower() == "split"), None)
                split = split or (None if own in attributes or split_of else own)
                fields |= {split: None, own: None}
            fault = sample.fault or _fault(sample, key, split)
            if fault:
                index.fault(None, place, fault)
                continue
            seen.update(sample.fields)
            for field in sample.fields if not attributes else ():
                if field not in fields:
                    fields[field] = None
                    if not is_attribute(field, said):
                        continue
                    columns.append(Column(field, said.get(field, said.get("*"))))
                    columns[-1].add_unknown(len(index.keys))
            name_of = text_of(sample.fields[key]) if key else _key(sample.name)
            given = text_of(sample.fields[split]) if split and not shares else split_of.get(tar)
            group_of = text_of(_cell(sample.fields.get(group))) if group else ""
            if index.add(name_of, f"{sample.picture[0]} {sample.picture[1]} {tar}", place, given, group_of):
                names.append((tar, sample.name))
                for column in columns:
                    column.add(_cell(sample.fields.get(column.name)))
    if not seen and not index.keys:
        raise ValueError(f"{source} holds no record with a picture and a JSON file")
    lacks = next((field for field in [*attributes, *(field for field in said if field != "*")] if field not in seen), None)
    if lacks or not columns:
        what = f"there is no field {lacks!r}" if lacks else "no field is left for attributes"
        raise ValueError(f"{source}: {what}; there are: {', '.join(sorted(seen))[:400]}")
    if not key:
        _part_keys(index.keys, names)
    entries, labels, bad = finished(columns, len(index.keys))
    about = {"format": "webdataset", "tars": len(tars)}
    return index.dataset(name, about, entries, labels, partial(read_in_tar, folder), shares, bad)


def _tars(source: Place) -> list[str]:
    if not source.is_dir():
        raise describe_missing(source, "tars")
    files = [file for file in source.files() if not is_litter(file)]
    tars = [file for file in files if file.lower().endswith(".tar")]
    packed = [file for file in files if file.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"))]
    if packed:
        raise ValueError(f"{source}: {packed[0]} is packed, so nothing in it can be read at its place; unpack it to .tar first")
    if not tars:
        raise describe_missing(source, "tars")
    return tars


def _splits_of(source: Place, tars: list[str]) -> dict[str, str]:
    """The split of each tar: a word of its name, or of the name of the innermost folder that says one."""
    splits = {}
    for tar in tars:
        for part in reversed(tar.lower().removesuffix(".tar").split("/")):
            said = [NAMES[word] for word in re.findall("[a-z]+", part) if word in NAMES]
            if len({*said}) > 1 and re.match("[a-z]*", part)[0] not in NAMES:
                raise ValueError(f"{source}: {tar} says {' and '.join(said)}; rename it, or split all anew with --split 80/10/10")
            if said:
                splits[tar] = said[0]
                break
    silent = [tar for tar in tars if tar not in splits]
    if splits and silent:
        raise ValueError(
            f"{source}: {silent[0]} says no split and {next(iter(splits))} does; move it into train/, valid/ or test/, or "
            "split all records anew with --split 80/10/10"
        )
    return splits


def _fault(sample: _Sample, key: str | None, split: str | None) -> str | None:
    if sample.picture is None:
        return "no picture"
    if sample.fields is None:
        return "no JSON"
    lacks = next((field for field in (key, split) if field and is_unknown(text_of(sample.fields.get(field)))), None)
    return f"its JSON has no {lacks!r}" if lacks else None


def _part_keys(keys: list[str], names: list[tuple[str, str]]) -> None:
    """Make each key of the tar's name and the record's, where names of records begin anew in each tar."""
    first: dict[str, str] = {}
    if all(first.setdefault(name, tar) == tar for tar, name in names):
        return
    keys[:] = [key_from_name(f"{os.path.splitext(tar)[0]}/{name}.x") for tar, name in names]
    logger.info("names of records begin anew in each tar: the tar's name is part of each key, as %s", keys[0])


def _key(name: str) -> str:
    return key_from_name(f"{name}.x") if key_fault(name) else name


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _samples(place: Place, tar: str, index: Index) -> Iterator[_Sample]:
    """The records of a tar: neighbours whose names agree up to the first dot, as webdataset has it.

    Only headers and JSON are read. Nothing is written, and no member's name is ever a path of this machine.
    """
    sample: _Sample | None = None
    try:
        with place.open() as file, tarfile.open(fileobj=file, mode="r:") as members:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            while (member := members.next()) is not None:
                members.members.clear()  # tarfile would keep them all
                name, extension = _parts(member.name)
                if not member.isreg() or extension is None:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{name} ends beyond the end of the file")
                if sample is None or sample.name != name:
                    if sample is not None:
                        yield sample
                    sample = _Sample(name)
                if f".{extension}".endswith(PICTURES):
                    if sample.picture is not None:
                        sample.fault = "two pictures"
                    sample.picture = (member.offset_data, member.size)
                elif extension == "json":
                    _read_fields(sample, members, member)
            file.seek(members.offset)
            end = file.read(_BLOCK)
            if end != bytes(_BLOCK):  # tarfile takes what is no header for the end
                raise tarfile.ReadError("it is cut short" if len(end) < _BLOCK else "what follows is no header")
    except _DAMAGE as error:
        index.fault(None, tar, f"damaged after record {sample.name[:100] if sample else 'none'}: {error}")
        return
    if sample is not None:
        yield sample


def _parts(name: str) -> tuple[str, str | None]:
    """A member's record, and its extension: what follows the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if dot and stem else None


def _read_fields(sample: _Sample, members: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    if member.size > _LARGEST_JSON:
        sample.fault = f"its JSON is {member.size:,} bytes"
        return
    try:
        fields = json.loads(members.extractfile(member).read())
        if not isinstance(fields, dict):
            raise ValueError(f"it holds {type(fields).__name__}, not fields")
        sample.fields = fields
    except (ValueError, RecursionError) as error:
        sample.fault = f"its JSON is damaged: {error}"
