"""Reading a shard set, here or at an address: its description, its manifest, its splits, its pictures' bytes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.datasets import SPLITS
from pipeline.data.datasets.source import Place, is_remote
from pipeline.data.remote import Remote, cache_folder, fetch, publish
from pipeline.data.shards.files import DESCRIPTION, FORMAT, MANIFEST, ORIENTATION, SHARD_NAME, WORK
from pipeline.data.shards.manifest import data_digest, labels_of, numbered, read_manifest, shards_of
from pipeline.files import digest_of, write_whole
from pipeline.images import decode

if TYPE_CHECKING:  # packing processes import this file and need neither torch nor pyarrow
    import pyarrow as pa
    from PIL import Image

    from fader.attributes import Attributes

_MAP_TRIALS = 20


def read_description(path: Path) -> dict[str, Any]:
    """dataset.json, checked as far as readers rely on it. Raises ValueError: absent, unfinished or damaged."""
    if not path.is_dir():
        raise ValueError(f"{path} is not there; write it with 'fader prepare'")
    if not (path / DESCRIPTION).is_file():
        if (path / WORK).is_dir():
            raise ValueError(
                f"{path} is not finished: {DESCRIPTION} is missing; run the same 'fader prepare' again to finish it"
            )
        raise ValueError(f"{path} holds no shard set: {DESCRIPTION} is missing; write one with 'fader prepare'")
    try:
        info = json.loads((path / DESCRIPTION).read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']}, this version reads {FORMAT}")
        for split in SPLITS:
            for shard in info["splits"][split]["shards"]:
                if not SHARD_NAME.fullmatch(shard["file"]) or int(shard["size"]) < 0 or not str(shard["digest"]):
                    raise ValueError(f"shard {shard['file']!r}")
        for entry in info["attributes"]:
            str(entry["name"]), str(entry["kind"]), list(entry["categories"])
        str(info["manifest"]["digest"]), str(info["name"]), str(info["digest"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path / DESCRIPTION} is damaged ({error}); remove {path} and run 'fader prepare' again") from error
    return info


def size_fault(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        short = "written short" if path.stat().st_size < size else "not the file that was written"
        return f"{path.name} is {path.stat().st_size:,} bytes, {DESCRIPTION} says {size:,}: {short}"
    return None


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set. digest: the data digest: what the data is, not how it was cut or where it lies.

    path: its folder; of a set that lies elsewhere the folder of the cache, and `remote` fetches its tars to there.
    """

    path: Path
    info: dict[str, Any] = field(repr=False)
    remote: Remote | None = None

    @classmethod
    def open(cls, path: Path | str) -> ShardSet:
        """Open a set in a folder or at an address; sizes of all files and the manifest's digest are checked, the tars are
        not read (`verify` does). Raises ValueError: not finished, or damaged; OSError: no answer."""
        if is_remote(path):
            return _open_remote(Place(os.fspath(path)))
        path = Path(path).expanduser()
        info = read_description(path)
        faults = [size_fault(path / shard["file"], shard["size"]) for shard in shards_of(info)]
        faults.append(size_fault(path / MANIFEST, info["manifest"]["size"]))
        if not any(faults) and digest_of(path / MANIFEST) != info["manifest"]["digest"]:
            faults.append(f"{MANIFEST} differs from its digest in {DESCRIPTION}")
        faults = [fault for fault in faults if fault]
        if faults:
            raise ValueError(f"{path}: {'; '.join(faults[:5])}; remove {path} and run 'fader prepare' again")
        return cls(path, info)

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def digest(self) -> str:
        return self.info["digest"]

    @cached_property
    def attributes(self) -> Attributes:
        from fader.attributes import Attributes

        return Attributes.from_list(self.info["attributes"])

    @cached_property
    def manifest(self) -> pa.Table:
        """The manifest, one row a record, all at once. Raises what `read_manifest` raises."""
        return read_manifest(self.path, self.info)

    def split(self, name: str) -> Split:
        """The records of one split. Raises ValueError: no such split, not one record in it, or what `manifest` raises."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; there are {', '.join(SPLITS)}")
        names = [shard["file"] for shard in self.info["splits"][name]["shards"]]
        table = read_manifest(self.path, self.info, name)
        if not len(table):
            counts = ", ".join(f"{split} {self.info['splits'][split]['records']:,}" for split in SPLITS)
            raise ValueError(f"{self.path} has no {name} records ({counts}); prepare a source that has some")
        shard = numbered(table["shard"], {file: number for number, file in enumerate(names)}).astype(np.int32)
        if (shard < 0).any():
            raise ValueError(
                f"{self.path / MANIFEST}: records of {name} stand in tars of another split; remove {self.path} and run "
                "'fader prepare' again"
            )
        columns = ("offset", "size", "width", "height", ORIENTATION)
        return Split(
            name=name, attributes=self.attributes, keys=np.array(table["key"].to_pylist()),
            labels=labels_of(table, self.info["attributes"]), shard=shard,
            **{column: np.array(table[column]) for column in columns if column in table.column_names},
            shards=[self.path / file for file in names], digest=data_digest(self.info["attributes"], table),
            remote=self.remote,
        )


def _open_remote(place: Place) -> ShardSet:
    """The set at an address. Its description is always fetched, its manifest when the cache has another or none."""
    try:
        description = (place / DESCRIPTION).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{place} holds no finished shard set: {DESCRIPTION} is missing") from error
    folder = cache_folder() / hashlib.sha256(description).hexdigest()[:32]
    write_whole(folder / DESCRIPTION, description, durable=False)
    info = read_description(folder)
    manifest = info["manifest"]
    if size_fault(folder / MANIFEST, manifest["size"]) or digest_of(folder / MANIFEST) != manifest["digest"]:
        fetch(place / MANIFEST, folder / MANIFEST, manifest["size"], manifest["digest"])
    files = {shard["file"]: (shard["size"], shard["digest"]) for shard in shards_of(info)}
    return ShardSet(folder, info, Remote(place, folder, files))


def upload(path: Path | str, address: str) -> None:
    """Copy a finished set to an address, its description last, so that nobody takes a part of it for the whole. What lies
    there already is read back, and sent again where it differs. Raises ValueError: `path` is no finished set or damaged,
    or another set lies at the address; OSError: the address cannot be written to."""
    whole, place = ShardSet.open(path), Place(address)
    description = (whole.path / DESCRIPTION).read_bytes()
    if (place / DESCRIPTION).is_file() and _is_another((place / DESCRIPTION).read_bytes(), description):
        raise ValueError(f"{address} already holds another set; choose another address, or remove it first")
    entries = [*shards_of(whole.info), whole.info["manifest"]]
    publish(whole.path, place, {entry["file"]: (entry["size"], entry["digest"]) for entry in entries})
    publish(whole.path, place, {DESCRIPTION: (len(description), hashlib.sha256(description).hexdigest())})


def _is_another(there: bytes, description: bytes) -> bool:
    """Whether a description is whole and another one; one that came only in part is none."""
    try:
        return there != description and bool(json.loads(there)["digest"])
    except (ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True, eq=False)
class Split:
    """The records of one split, in the order of its tars, which is a fixed shuffle.

    keys [n] str; labels [n, A] float32 in the order of `attributes`, -1 unknown; shard [n] int32 into `shards`;
    offset, size [n] int64: where the picture's bytes lie in that tar; width, height [n] int32, upright;
    orientation [n] int8, 1 to 8: which way up it is stored; None in an older set, of which each decoder reads Exif itself;
    digest: the data digest of these records alone.
    """

    name: str
    attributes: Attributes
    keys: np.ndarray
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    shards: list[Path]
    digest: str
    remote: Remote | None = None
    orientation: np.ndarray | None = None
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def columns(self, attributes: Attributes) -> np.ndarray:
        """Labels of the named attributes: [n, len(attributes)] float32. Raises ValueError: the set has no such attribute,
        or one of another kind or other categories."""
        rows = [self.attributes.index(attribute.name) for attribute in attributes]
        for attribute, row in zip(attributes, rows):
            stored = self.attributes[row]
            if stored != attribute:
                raise ValueError(f"{attribute.name} is {kind_of(stored)} in this set, {kind_of(attribute)} is asked for")
        return self.labels[:, rows]

    def bytes(self, row: int) -> np.ndarray:
        """The picture's bytes as they came: 1-D uint8, a view into the mapped tar. Safe from several threads."""
        number = int(self.shard[row])
        tar = self._maps.get(number)
        if tar is None:
            tar = self._maps.setdefault(number, self._mapped(number))
        offset = int(self.offset[row])
        return tar[offset : offset + int(self.size[row])]

    def picture(self, row: int) -> Image.Image:
        """The picture, upright, in RGB. Raises ValueError: it does not decode."""
        return decode(self.bytes(row), None if self.orientation is None else int(self.orientation[row]))

    def _mapped(self, number: int) -> np.ndarray:
        """A tar, mapped; what another process, or this one, removed from the cache is let go, which gives the disk back."""
        for other in list(self._maps) if self.remote else ():
            if not self.shards[other].exists():
                self._maps.pop(other, None)
        return mapped(self.shards[number], self.remote)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def mapped(path: Path, remote: Remote | None) -> np.ndarray:
    """The bytes of a tar, mapped: 1-D uint8. Where the set lies elsewhere, it is fetched first. Raises ValueError: what
    came is not what the set says of it; OSError: it cannot be read, or others take its room in the cache."""
    for _ in range(_MAP_TRIALS if remote else 1):
        local = remote.fetch(path.name) if remote else path
        try:
            return np.asarray(np.memmap(local, np.uint8, "r"))  # slices of it cost a third of a memmap's
        except FileNotFoundError:  # it made room for another tar before it was mapped
            if remote is None:
                raise
    raise OSError(f"the cache has no room for {path.name} beside what others read; raise FADER_CACHE_GB")


def kind_of(attribute: Any) -> str:
    return f"{attribute.kind} ({', '.join(attribute.categories)})" if attribute.categories else attribute.kind
