"""What a data set is to the rest of the pipeline: a light index of records, and a way to read one record's bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # processes that pack shards import this file and need no torch
    from fader.attributes import Attributes

SPLITS = ("train", "valid", "test")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")


class LeftOut(NamedTuple):
    """A record that is not in the set although it was declared. key: None when the fault belongs to no record."""

    key: str | None
    reason: str


@dataclass(frozen=True)
class Dataset:
    """The light index of a set, whose name is one in DATASETS. Images are not in it.

    source: what dataset.json says of the origin; no path and no time, because equal data must give equal files. labels: [N,
    A] float32, -1 unknown; keys, splits, locations and places (where it is declared) are one string a record. read:
    location to image bytes; raises OSError or ValueError, and pickles. left_out: by the reader.
    """

    name: str
    source: dict[str, Any]
    attribute_list: list[dict[str, Any]]
    keys: list[str]
    splits: list[str]
    locations: list[str]
    labels: np.ndarray
    places: list[str]
    read: Callable[[str], bytes]
    left_out: list[LeftOut] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (len(self.keys), len(self.attribute_list))
        if self.labels.shape != shape:
            raise ValueError(f"labels are {self.labels.shape}; {shape[0]} records with {shape[1]} attributes need {shape}")
        if len({*self.keys}) < len(self.keys) or not {*self.splits} <= {*SPLITS}:
            raise ValueError(f"{self.name}: a key stands twice, or a split is none of {', '.join(SPLITS)}")
        if not all(map(_KEY.fullmatch, self.keys)):
            row = next(row for row, key in enumerate(self.keys) if key_fault(key))
            raise ValueError(f"{self.places[row]}: {key_fault(self.keys[row])}")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def attributes(self) -> Attributes:
        from fader.attributes import Attributes

        return Attributes.from_list(self.attribute_list)

    def part(self, rows: Sequence[int]) -> Dataset:
        keys, splits, locations, places = (
            [column[row] for row in rows] for column in (self.keys, self.splits, self.locations, self.places)
        )
        labels = self.labels[rows]
        return replace(self, keys=keys, splits=splits, locations=locations, labels=labels, places=places, left_out=[])

    def digest(self) -> str:
        """sha256 of the index: name, source, attributes, keys, splits and labels. Paths and places are not in it."""
        head = json.dumps([self.name, self.source, self.attribute_list], sort_keys=True)
        digest = hashlib.sha256(head.encode())
        for part in (self.keys, self.splits):
            digest.update("\n".join(part).encode())
        digest.update(np.ascontiguousarray(self.labels, "<f4").tobytes())
        return digest.hexdigest()


def key_from_name(name: str) -> str:
    """The key of a picture that has a file name alone: the name without its extension, folders parted by `__`.

    A name with other letters than a key may have, or a long one, gets a digest, so that no other name gives the same key.
    """
    folder, _, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    stem = f"{folder}/{stem}" if folder else stem
    plain = stem.replace("/", "__")
    if "__" not in stem and _KEY.fullmatch(plain):
        return plain
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]+', '-', plain).strip('-')[-70:]}-{digest}"


def key_fault(key: str) -> str | None:
    """Why a key cannot name members of a tar, or None: it must be a plain name, so that nothing escapes a folder."""
    if _KEY.fullmatch(key):
        return None
    return f"{key[:100]!r} is no plain name; letters, digits, '-' and '_', at most 90 of them, make a key"
