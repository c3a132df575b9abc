"""Pictures sorted into folders.

    trainA/ trainB/ testA/ testB/      two domains, as unpaired image translation has them (apple2orange): binary
    CLASS/…                            a folder a class
    train/CLASS/… test/CLASS/…         the same, with splits; also CLASS/train/… CLASS/test/…

Two classes make a binary attribute that is called like the second of them in the alphabet; more make one k-way
attribute. A folder is a class when it holds pictures: a folder without any is named and left out.
"""

import logging
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from pipeline.data.datasets.index import Index
from pipeline.data.datasets.record import Dataset, key_from_name
from pipeline.data.datasets.source import PICTURES, Place, is_litter, read_in, tell_not_taken
from pipeline.data.datasets.splits import NAMES, Shares

_DOMAIN = re.compile(r"([A-Za-z]+)[ _-]?([AB])")
_SPLITS = {name: split for name, split in NAMES.items() if not name.isdigit()}  # folders called 0 and 1 are classes
_OTHER_PICTURES = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ppm", ".pgm", ".tga", ".dng")
"""Extensions of pictures that shards do not hold."""

logger = logging.getLogger(__name__)


def read_folders(
    source: os.PathLike[str] | str, *, attribute: str | None = None, names: Sequence[str] = (),
    shares: Shares | None = None, skip_bad: bool = False, name: str = "folders",
) -> Dataset:
    """The index of a folder of folders. attribute: its name, by default that of the second of two classes, else "class".
    names: of the domains A and B. Raises ValueError where the folders are no classes, or hold what shards do not hold."""
    source = Place(os.fspath(source))
    if not source.is_dir():
        packed = source.is_file() and source.name.lower().endswith(".zip")
        raise ValueError(f"{source} is no folder" + (f"; name what lies in it as zip://::{source}" if packed else ""))
    files, index = source.files(), Index(skip_bad)
    pictures = _pictures_of_classes(source, files, index)
    classes = sorted({label for _, _, label in pictures.values()})
    twins = [label for label, other in pairwise(sorted(classes, key=str.lower)) if label.lower() == other.lower()]
    if twins:
        raise ValueError(f"{source}: classes differ in capitals alone, as {twins[0]}; rename their folders")
    if len(classes) < 2:
        raise _too_few(source, files)
    if names and len(names) != len(classes):
        raise ValueError(f"--names gives {len(names)} names for {len(classes)} classes: {', '.join(classes)}")
    tell_not_taken(source, [file for file in files if file not in pictures])
    labels = []
    for location, (_, split, label) in sorted(pictures.items(), key=lambda item: (item[1][0].split("/"), item[0])):
        if index.add(key_from_name(location), location, location, split):
            labels.append(classes.index(label))
    words = list(names) or classes
    entry = {"name": attribute or "class", "kind": "k-way", "categories": words}
    if len(words) == 2:
        entry = {"name": attribute or words[1], "kind": "binary", "categories": []}
    return index.dataset(name, {"format": "folders", "classes": words}, [entry], labels, partial(read_in, source), shares)


def _pictures_of_classes(source: Place, files: list[str], index: Index) -> dict[str, tuple[str, str | None, str]]:
    """Folder, split and class of each file that is a record. What looks wrong with the folders is a fault."""
    below = [file for file in files if "/" in file and not is_litter(file)]
    taken = [file for file in below if file.lower().endswith(PICTURES)]
    foreign = [file for file in below if file.lower().endswith(_OTHER_PICTURES)]
    folders = {file.partition("/")[0] for file in (*taken, *foreign)}
    domains = {folder: match for folder in folders if (match := _DOMAIN.fullmatch(folder)) and match[1].lower() in _SPLITS}
    splits = {folder for folder in folders if folder.lower() in _SPLITS}
    inside = {file.split("/")[1].lower() for file in taken if file.count("/") > 1} & _SPLITS.keys()
    inside_out = not (domains or splits) and len({_SPLITS[name] for name in inside}) > 1
    like = {folder: _SPLITS[word] for folder in sorted(folders) if (word := re.split("[^a-z]", folder.lower())[0]) in _SPLITS}
    if len({*like.values()}) > 1 and not (domains or splits):
        raise ValueError(f"{source}: {' and '.join([*like][:2])} are called like splits; rename them to train, valid or test")
    for stranger in sorted(folders - (domains.keys() or splits or folders)):
        index.fault(None, f"{source}/{stranger}", f"it holds pictures beside {', '.join(sorted(domains or splits))}")
    empty = sorted(set(source.folders()) - folders)
    if empty:
        logger.warning("%s: folders without a picture, which are no classes: %s", source, ", ".join(empty)[:400])

    def place_of(file: str) -> tuple[str, str | None, str] | None:
        folder, *rest = file.split("/")
        if domains:
            return (folder, _SPLITS[domains[folder][1].lower()], domains[folder][2]) if folder in domains else None
        if splits:
            split = _SPLITS.get(folder.lower())
            return (f"{folder}/{rest[0]}", split, rest[0]) if split and len(rest) > 1 else None
        if inside_out:
            split = _SPLITS.get(rest[0].lower()) if len(rest) > 1 else None
            return (folder, split, folder) if split else None
        return folder, None, folder

    pictures = {file: place for file in taken if (place := place_of(file))}
    beside = next((file for file in taken if inside_out and file not in pictures), None)
    if beside:
        index.fault(None, f"{source}/{beside}", f"it lies beside the folders {', '.join(sorted(inside))}")
    if not source.remote:
        pictures = _without_twice(source, pictures, index)
    held = {place[0] for place in pictures.values()}
    lost: dict[str, str] = {}
    for file in foreign:
        if (place := place_of(file)) and place[0] not in held:
            lost.setdefault(place[0], file)
    for folder, file in lost.items():
        words = "shards hold JPEG, PNG and WebP, and it has none of them: convert its pictures to PNG"
        index.fault(None, f"{source}/{folder}", f"{words} ({file.rpartition('/')[2]})")
    return pictures


def _without_twice(
    source: Place, pictures: dict[str, tuple[str, str | None, str]], index: Index
) -> dict[str, tuple[str, str | None, str]]:
    """Leave out the pictures of a folder that links put into a second class or split. Each such folder is a fault."""
    root, torn = os.path.realpath(source.address), set()
    places: dict[str, tuple[str, str | None, str]] = {}
    real = {folder: os.path.realpath(os.path.join(root, folder)) for folder in {*map(os.path.dirname, pictures)}}
    place_of = {os.path.dirname(file): place for file, place in pictures.items()}
    for folder in sorted(real, key=lambda folder: (real[folder] != os.path.join(root, folder), folder)):  # links last
        first = places.setdefault(real[folder], place_of[folder])
        if first != place_of[folder]:
            torn.add(folder)
            index.fault(None, f"{source}/{folder}", f"it is a link to pictures that stand in {first[0]} already")
    return {file: place for file, place in pictures.items() if os.path.dirname(file) not in torn}


def _too_few(source: Place, files: list[str]) -> ValueError:
    folders = source.folders()
    inner = len(folders) == 1 and any(file.count("/") > 1 for file in files)
    hint = f"; is it {source / folders[0]} that you mean?" if inner else ""
    has = ", ".join(folders) or "no folder"
    return ValueError(
        f"{source} holds {has}; at least two folders of pictures, one a class, or trainA and trainB are needed{hint}"
    )
