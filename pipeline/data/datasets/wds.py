"""WebDataset tars that exist already: a picture and a JSON file a record, as img2dataset and others write them.

The tars are not unpacked: the index says where each picture's bytes lie in them.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.datasets.columns import choose
from pipeline.data.datasets.record import Dataset, Faults, key_fault, key_of
from pipeline.data.datasets.source import PICTURES, Place, describe_missing
from pipeline.data.datasets.splits import NAMES, Shares
from pipeline.data.datasets.table import Rows

IMG2DATASET = (
    "caption url key status error_message width height original_width original_height exif sha256 md5 shard_id "
    "similarity hash punsafe pwatermark aesthetic face_bboxes"
).split()
"""Fields that img2dataset writes by itself; attributes are what stands beside them."""
_LARGEST_JSON, _BLOCK = 16 << 20, 512
_DAMAGE = (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError, IndexError)


@dataclass(frozen=True)
class TarReader:
    """Reads the picture at `OFFSET SIZE TAR`."""

    folder: Place

    def __call__(self, location: str) -> bytes:
        offset, size, tar = location.split(" ", 2)
        data = (self.folder / tar).read_part(int(offset), int(size))
        if len(data) != int(size):
            raise ValueError(f"{tar} ends before byte {int(offset) + int(size):,}")
        return data


@dataclass
class _Sample:
    """The members of one record: where its picture lies, and its fields."""

    name: str
    picture: tuple[int, int] | None = None
    fields: dict[str, Any] | None = None
    fault: str | None = None


def read_wds(
    source: os.PathLike[str] | str,
    *,
    key: str | None = None,
    split: str | None = None,
    group: str | None = None,
    attributes: Sequence[str] = (),
    kinds: Sequence[str] = (),
    shares: Shares | None = None,
    skip_bad: bool = False,
    name: str = "wds",
) -> Dataset:
    """The index of a folder of tars, or of one tar.

    Splits are what `split` says, else what the tars' names begin with (train-000.tar), else 80/10/10 by a hash.

    Args:
        source: the folder or tar.
        key, split, group: fields of the JSON that name the record, its split, and a group that one split must hold;
            without `key` the name of its members is taken.
        attributes: fields to take; none takes every field of the first record but img2dataset's own.
        kinds: what fields are where it does not follow from their values; see `columns.Kind`.
        shares: split the records anew, by a hash.
        skip_bad: leave out what is wrong, and list it. What img2dataset itself failed to fetch is always left out.

    Raises:
        ValueError: no tar, a damaged one, or a record is wrong. The message names tar and record.
    """
    source = Place(os.fspath(source))
    folder, tars = (source.parent, [source.name]) if source.is_file() else (source, _tars(source))
    if not tars:
        raise describe_missing(source, "tars")
    named = [_split_of(tar) for tar in tars]
    faults = Faults(skip_bad)
    index: Rows | None = None
    header: list[str] = []
    for tar, tar_split in zip(tars, named):
        for sample in _samples(folder / tar, tar, faults):
            place = f"{tar} record {sample.name[:100]}"
            if sample.picture is None and (sample.fields or {}).get("status", "success") != "success":
                continue
            fault = sample.fault or ("no picture" if sample.picture is None else None)
            fault = fault or ("no JSON" if sample.fields is None else None)
            if fault:
                faults.add(None, place, fault)
                continue
            if index is None:
                header = list(sample.fields)
                others = [*IMG2DATASET, *(field for field in (key, split, group) if field)]
                try:
                    index = Rows(faults, choose([*header, *attributes], attributes, kinds, others))
                except ValueError as error:
                    raise ValueError(f"{place}: {str(error).replace('column', 'field')}") from error
            lacks = next((f for f in (key, split, group) if f and sample.fields.get(f) in (None, "")), None)
            if lacks:
                faults.add(None, place, f"its JSON has no {lacks!r}")
                continue
            index.add(
                str(sample.fields[key]) if key else _key(sample.name),
                f"{sample.picture[0]} {sample.picture[1]} {tar}",
                place,
                [_cell(sample.fields.get(column.name)) for column in index.columns],
                None if shares else sample.fields[split] if split else tar_split if None not in named else None,
                sample.fields[group] if group else None,
            )
    if index is None:
        raise ValueError(f"{source} holds no record with a picture and a JSON file")
    return index.dataset(name, {"format": "webdataset", "tars": len(tars)}, TarReader(folder), shares)


def _tars(folder: Place) -> list[str]:
    if not folder.is_dir():
        raise describe_missing(folder, "tars")
    return folder.files(".tar")


def _split_of(tar: str) -> str | None:
    return NAMES.get(re.match("[a-z]*", tar.rpartition("/")[2].lower())[0])


def _key(name: str) -> str:
    return key_of(f"{name}.x") if key_fault(name) else name


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _samples(place: Place, tar: str, faults: Faults) -> Iterator[_Sample]:
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
        faults.add(None, tar, f"damaged after record {sample.name[:100] if sample else 'none'}: {error}")
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
