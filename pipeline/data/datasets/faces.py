"""Drawn faces: a set whose truth is known, for the demo and the tests, with no photograph in it.

Faces are drawn at CelebA's geometry (178x218, eyes near (69, 111) and (108, 111)), so that the same crop fits, and are
written in CelebA's file format, so that the same reader reads them. A face is a pure function of (seed, index, labels):
the same person can be drawn again with one attribute changed.

Attributes, each drawn independently: Eyeglasses (rare), Smiling, Wearing_Hat, Blond_Hair, and Beard with three values.
Nuisance, independent of them: skin, face shape, hair colour, length and parting, pose, background, light, clothes.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.datasets.celeba import ANNOTATION, IMAGES, PARTITION, read_celeba
from pipeline.data.datasets.drawing import draw, draw_dressed
from pipeline.data.datasets.person import person
from pipeline.data.datasets.record import SPLITS, Dataset
from pipeline.data.datasets.splits import split_of_place
from pipeline.data.datasets.workers import Progress, silent, spread, tick
from pipeline.files import replacing, write_json, write_whole
from pipeline.ownership import owned

VERSION = 1  # of the drawing; a change of it is another source
WORK = ".drawing"
_CHUNK = 128  # faces a worker draws at a time
RATES = {"Eyeglasses": 0.06, "Smiling": 0.5, "Wearing_Hat": 0.4, "Blond_Hair": 0.45}
BEARDS = ("none", "moustache", "beard")
LOOKS = 16  # in which a twin may have what its photo does not show
UNSEEN = {  # what a photo does not show of a new value of an attribute
    "Eyeglasses": ("frame", "lens", "lens_kind"),
    "Wearing_Hat": ("hat", "band", "hat_kind"),
    "Blond_Hair": ("blond", "not_blond"),
}


def face_labels(seed: int, index: int) -> dict[str, int]:
    """The labels of a face: 0 or 1, and the number of a value in BEARDS."""
    chance = Random(f"labels {seed} {index}")
    labels = {name: int(chance.random() < rate) for name, rate in RATES.items()}
    labels["Beard"] = int(chance.random() * len(BEARDS))
    return labels


def draw_face(seed: int, index: int, **forced: int) -> Image.Image:
    """A face, 178x218 RGB. `forced` replaces labels and nothing else: the person, pose and light stay."""
    labels = face_labels(seed, index)
    for name, value in forced.items():
        if name not in labels or not 0 <= value < (len(BEARDS) if name == "Beard" else 2):
            raise ValueError(f"faces have no {name} = {value!r}; attributes are {', '.join(labels)}")
    return draw(person(Random(f"person {seed} {index}")), {**labels, **forced})


def draw_twins(seed: int, index: int, name: str, value: int) -> list[Image.Image]:
    """Draw a face again with one attribute changed, in each look that the photo allows.

    Which hat, which glasses and which other colour of hair a photo cannot tell, so other people lend theirs.
    """
    labels, own = {**face_labels(seed, index), name: value}, vars(person(Random(f"person {seed} {index}")))
    unseen = UNSEEN.get(name, ()) if value or name == "Blond_Hair" else ()
    lenders = [vars(person(Random(f"twin {seed} {index} {look}"))) for look in range(LOOKS if unseen else 1)]
    others = [SimpleNamespace(**{**own, **{part: lender[part] for part in unseen}}) for lender in lenders]
    if name == "Blond_Hair":
        return [draw(other, labels) for other in others]
    return draw_dressed(others[0], labels, others)


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.jpg"


def _path(index: int) -> str:
    return f"{IMAGES[0]}/{_file_name(index)}"


def _draw_files(source: Path, path_of: Callable[[int], str], picture: Callable[[int], Image.Image], indices: range) -> None:
    for index in indices:
        tick()
        path = source / path_of(index)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, source / WORK, durable=False) as file:
                file.write(jpeg_bytes(picture(index)))


def jpeg_bytes(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()


def face_twins(seed: int, key: str) -> Iterator[tuple[str, int, list[Image.Image]]]:
    """Give each attribute's other values, and the twins of a face that have them."""
    for name, own in face_labels(seed, int(key) - 1).items():
        for value in range(len(BEARDS) if name == "Beard" else 2):
            if value != own:
                yield name, value, draw_twins(seed, int(key) - 1, name, value)


def draw_missing(
    source: Path, name: str, origin: dict[str, Any], path_of: Callable[[int], str], picture: Callable[[int], Image.Image],
    workers: int | None, progress: Progress,
) -> None:
    """Draw the pictures of a drawn set that are not there yet.

    origin: count, seed and version of the drawing, which SOURCE/NAME.json says. path_of, picture: of each index, the file
    below `source` and what stands in it; both pickle. Raises ValueError: fewer than 10 pictures, or others are there.
    """
    count = origin["count"]
    if count < 10 or (workers is not None and workers < 1):
        raise ValueError(f"count is {count} and workers {workers}; at least 10 pictures and 1 worker are needed")
    (source / WORK).mkdir(parents=True, exist_ok=True)
    with owned(source / WORK / "lock", str(source)):
        _claim(source / f"{name}.json", origin)
        jobs = [range(count)[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        spread(partial(_draw_files, source, path_of, picture), jobs, workers, count, progress, few=0)


def read_faces(
    source: Path | str, *, count: int, seed: int = 0, workers: int | None = None, skip_bad: bool = False,
    progress: Progress = silent,
) -> Dataset:
    """Draw the faces that are missing in `source`, in CelebA's file format, and read them as CelebA is read; Beard, which
    that format cannot hold, follows from the seed. The first 80% are train, the next 10% valid, the rest test."""
    source, origin = Path(source), {"drawn": VERSION, "count": count, "seed": seed}
    draw_missing(source, "faces", origin, _path, partial(draw_face, seed), workers, progress)
    labels = [face_labels(seed, index) for index in range(count)]
    _annotate(source, labels)
    faces = read_celeba(source, skip_bad=skip_bad, name="faces", origin=origin)
    beards = np.array([[label["Beard"]] for label in labels], np.float32)
    return replace(
        faces,
        attribute_list=[*faces.attribute_list, {"name": "Beard", "kind": "k-way", "categories": list(BEARDS)}],
        labels=np.hstack([faces.labels, beards]),
    )


def _claim(note: Path, origin: dict[str, Any]) -> None:
    if note.exists() and json.loads(note.read_text()) != origin:
        before = note.read_text().strip()
        raise ValueError(f"{note.parent} holds other drawn {note.stem} ({before}); remove it, or choose another folder")
    write_json(note, origin, indent=None)


def _annotate(source: Path, labels: list[dict[str, int]]) -> None:
    """Write CelebA's two text files, with the line ends and blanks of the published ones."""
    count = len(labels)
    signs = [" ".join(f"{2 * label[name] - 1:2d}" for name in RATES) for label in labels]
    rows = [f"{_file_name(i)} {sign}" for i, sign in enumerate(signs)]
    splits = [f"{_file_name(i)} {SPLITS.index(split_of_place(i, count))}" for i in range(count)]
    for name, lines in ((ANNOTATION[0], [str(count), " ".join(RATES) + " ", *rows]), (PARTITION[0], splits)):
        write_whole(source / name, "".join(f"{line}\r\n" for line in lines))
