"""Pictures sorted into folders.

    trainA/ trainB/ testA/ testB/      two domains, as unpaired image translation has them (apple2orange): binary
    CLASS/…                            a folder a class
    train/CLASS/… test/CLASS/…         the same, with splits

Two classes make a binary attribute that is called like the second of them in the alphabet; more make one k-way
attribute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np

from pipeline.data.datasets.record import Dataset, Faults, key_of
from pipeline.data.datasets.source import PICTURES, Place, Reader
from pipeline.data.datasets.splits import NAMES, Shares, assign

_DOMAIN = re.compile(r"([a-z]+)([AB])")


def read_folders(
    source: os.PathLike[str] | str,
    *,
    attribute: str | None = None,
    names: Sequence[str] = (),
    shares: Shares | None = None,
    skip_bad: bool = False,
    name: str = "folders",
) -> Dataset:
    """The index of a folder of folders.

    Args:
        source: the folder.
        attribute: what to call the attribute; by default the second class when there are two, otherwise "class".
        names: of the two domains A and B.
        shares: split the records anew.
        skip_bad: leave out what cannot be a record (two files of one key), and list it.

    Raises:
        ValueError: no folder, fewer than two classes, or two files of one key.
    """
    source = Place(os.fspath(source))
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    folders = source.folders()
    classes = _classes(source, folders)
    labels_of = sorted({label for _, _, label in classes})
    if len(labels_of) < 2:
        found = ", ".join(folders) or "no folder"
        raise ValueError(f"{source} holds {found}; at least two folders, one a class, or trainA and trainB are needed")
    if names and len(names) != len(labels_of):
        raise ValueError(f"--names gives {len(names)} names for {len(labels_of)} classes: {', '.join(labels_of)}")
    faults, first = Faults(skip_bad), {}
    keys, given, locations, labels = [], [], [], []
    for folder, split, label in classes:
        for file in (source / folder).files(*PICTURES):
            location = f"{folder}/{file}"
            key = key_of(location)
            if key in first:
                faults.add(key, location, f"its key {key} is that of {first[key]} already; rename one")
                continue
            first[key] = location
            keys.append(key)
            given.append(split)
            locations.append(location)
            labels.append(labels_of.index(label))
    splits, how = assign(keys, given=None if None in given else given, shares=shares)
    words = list(names) or labels_of
    entry = {"name": attribute or "class", "kind": "k-way", "categories": words}
    if len(words) == 2:
        entry = {"name": attribute or words[1], "kind": "binary", "categories": []}
    return Dataset(
        name=name,
        source={"format": "folders", "classes": words, "split": how},
        attribute_list=[entry],
        keys=keys,
        splits=splits,
        locations=locations,
        labels=np.array(labels, np.float32).reshape(-1, 1),
        places=locations,
        read=Reader(source),
        left_out=faults.left_out,
    )


def _classes(source: Place, folders: list[str]) -> list[tuple[str, str | None, str]]:
    """(folder, split, class) of every folder that holds one class."""
    domains = [(folder, _DOMAIN.fullmatch(folder)) for folder in folders]
    if any(match and match[1] in NAMES for _, match in domains):
        return [(folder, NAMES[match[1]], match[2]) for folder, match in domains if match and match[1] in NAMES]
    if folders and all(folder.lower() in NAMES for folder in folders):
        return [
            (f"{folder}/{label}", NAMES[folder.lower()], label)
            for folder in folders
            for label in (source / folder).folders()
        ]
    return [(folder, None, folder) for folder in folders]
