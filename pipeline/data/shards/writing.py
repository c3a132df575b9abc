"""Writing one shard: a tar of pictures and labels, and a note on it; or taking what an earlier run left of both."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.datasets import Dataset, LeftOut
from pipeline.data.datasets.workers import tick
from pipeline.data.shards.files import EXTENSIONS, FORMAT, ORIENTATION, WORK, TarWriter, label_members, sha256
from pipeline.files import digest_of, replacing
from pipeline.images import Check, Checked, check


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the records dealt to it, and where it goes."""

    out: Path
    name: str
    data: Dataset
    skip_bad: bool
    check: Check = "full"

    @property
    def note(self) -> Path:
        return self.out / WORK / f"{self.name}.json"

    @property
    def names_and_kinds(self) -> tuple[list[str], list[str]]:
        return [e["name"] for e in self.data.attribute_list], [e["kind"] for e in self.data.attribute_list]

    def digest(self) -> str:
        content = [FORMAT, self.name, *self.names_and_kinds, self.data.keys, self.data.locations]
        return sha256(json.dumps(content).encode() + np.ascontiguousarray(self.data.labels, "<f4").tobytes())


COLUMNS = ("record", "offset", "size", "digest", "width", "height", "extension", ORIENTATION)
"""What a note says of each record; `record` is its number among those that were dealt to the shard."""


@dataclass(frozen=True)
class Written:
    """A shard as it stands on the disk. columns: what `COLUMNS` names of every record in it."""

    job: str
    size: int
    digest: str
    columns: dict[str, list[Any]]
    left_out: list[LeftOut]


def _picture(read: Callable[[str], bytes], location: str, depth: Check) -> tuple[bytes, Checked] | str:
    """The bytes of a picture and what `check` says of them; or what is wrong with it."""
    try:
        data = read(location)
        checked = check(data, depth)
    except FileNotFoundError as error:
        return f"picture {location} is missing ({error.filename})"
    except (OSError, ValueError) as error:
        return f"picture {location} cannot be read: {error}"
    if checked.format not in EXTENSIONS:
        return f"picture {location} is {checked.format}; shards hold {', '.join(EXTENSIONS)}"
    return data, checked


def write_shard(job: ShardJob) -> Written:
    """Write one tar and, when it is whole, the note on it, unless an earlier run did. Neither is flushed to the disk: a
    tar that differs from its note is written again, and all tars are flushed before the set is described."""
    if written := finished_shard(job):
        return written
    said, left_out, data = [], [], job.data
    members = label_members(*job.names_and_kinds, data.labels)
    with replacing(job.out / job.name, job.out / WORK, durable=False) as file:
        tar = TarWriter(file)
        records = zip(data.keys, data.locations, data.places, members, strict=True)
        for record, (key, location, place, labels) in enumerate(records):
            tick()
            picture = _picture(data.read, location, job.check)
            if isinstance(picture, str):
                if not job.skip_bad:
                    raise ValueError(f"{place}: {picture}; mend it, or leave such records out with --skip-bad")
                left_out.append(LeftOut(key, f"{place}: {picture}"))
                continue
            content, (width, height, orientation, kind) = picture
            extension = EXTENSIONS[kind]
            offset = tar.add(key, extension, content, labels)
            said += (record, offset, len(content), sha256(content), width, height, extension, orientation)
        tar.end()
    columns = {name: said[number :: len(COLUMNS)] for number, name in enumerate(COLUMNS)}
    written = Written(job.digest(), tar.size, tar.digest.hexdigest(), columns, left_out)
    with replacing(job.note, job.out / WORK, durable=False) as file:
        file.write(json.dumps(vars(written)).encode())
    return written


def finished_shard(job: ShardJob, short: bool = False) -> Written | None:
    """The shard an earlier run finished, when it is whole and of the same records.

    short: take it also when bad ones were left out of it; otherwise None, so that they are tried again.
    """
    try:
        entries = json.loads(job.note.read_text())
        written = Written(**{**entries, "left_out": [LeftOut(*entry) for entry in entries["left_out"]]})
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):  # not there, or an earlier version's, which had rows
        return None
    tar = job.out / job.name
    if (written.left_out and not short) or written.job != job.digest() or not tar.is_file() or digest_of(tar) != written.digest:
        return None
    tick(len(job.data))
    return written
