"""One road from a photo to an edited photo: read it, find the face, cut it square, edit it, paste it back."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fader.similarity import Similarity
from pipeline.faces.alignment import NO_FACE, Face, crop, find
from pipeline.images import Preprocessing, decode, preprocess, to_float, to_uint8
from pipeline.models import Model, Slider

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OURS = "attribute-sliders"  # as pictures say who made them
SOFT_EDGE = 0.15  # share of the square's side over which a pasted face fades into the photo


def listed(paths: Sequence[Path]) -> list[Path]:
    """Return the pictures that were named, and those in folders that were named.
    Raises ValueError: something is not there, or a folder holds no picture."""
    photos: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such photo or folder")
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no picture ({', '.join(SUFFIXES)})")
        photos += inside
    return photos


def read(path: Path) -> Image.Image:
    """Decode a photo, upright and in colour; raise ValueError with its name where the file is no picture."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name pictures in it, as {path}/*.jpg")
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class NoFace(ValueError):
    """A photo in which no face is found."""


@dataclass(frozen=True)
class Portrait:
    """A face cut out of a photo as a model reads it.

    name: what messages call the photo, its path. photo: the whole picture, upright. pixels: uint8 [S, S, C].
    frame: from the pixels of the square to the photo's.
    shown: the part of the square that shows the photo, not margins: its first and its last pixel, as x + iy.
    notes: what a person should know of how it was cut.
    """

    name: str
    photo: Image.Image
    pixels: np.ndarray
    frame: Similarity
    shown: tuple[complex, complex]
    notes: tuple[str, ...] = ()


def portraits(name: str, photo: Image.Image, rule: Preprocessing, align: bool, aligner: Model | None = None) -> list[Portrait]:
    """Cut a photo to a model's squares: one around each of its faces, the largest first, or the one of `portrait`.
    Raises NoFace: the photo shows none; its name stands in the message."""
    if not align:
        return [portrait(name, photo, rule)]
    faces = find(np.asarray(photo), aligner)
    if not faces:
        raise NoFace(f"{name}: {NO_FACE}")
    cut = []
    for face in faces:
        around = portrait(name, photo, rule, face)
        hardly = f"the face in {name} was hardly seen; look whether it was cut rightly"
        cut.append(dataclasses.replace(around, notes=(*[hardly] * (not face.sure), *around.notes)))
    return cut


def portrait(name: str, photo: Image.Image, rule: Preprocessing, face: Face | None = None) -> Portrait:
    """Cut a photo to a model's square: around a face where one is given, else the whole photo by the model's crop rule.
    A photo whose size the crop rule does not take gives its centred square, and a note says so."""
    picture, frame, notes = photo, Similarity(), ()
    if face is not None:
        picture, frame = Image.fromarray(crop(np.asarray(photo), face.frame)), face.frame
    fitting = rule.fitting(*picture.size)
    if fitting != rule:
        notes = (
            f"{name} is {picture.width}x{picture.height}, which the model's crop rule '{rule.crop}' does not take. "
            "Its centred square is used: the face should fill it as in the training images",
        )
    square, shown = _square(fitting, picture.size)
    return Portrait(name, photo, preprocess(picture, fitting), frame @ square, shown, notes)


def _square(rule: Preprocessing, size: tuple[int, int]) -> tuple[Similarity, tuple[complex, complex]]:
    """Return the similarity from a model's square to a picture of this size, and the part of the square that it fills."""
    boxes = rule.boxes(*np.array(size)[:, None])
    sides = rule.resized(boxes)
    margin, box = complex(*rule.margins(sides)[0].tolist()), boxes[0].tolist()
    scale = max(box[2] - box[0], box[3] - box[1]) / rule.image_size
    corner = complex(box[0], box[1]) - scale * margin + complex(1, 1) * (scale - 1) / 2
    return Similarity(complex(scale), corner), (margin, margin + complex(*(sides[0] - 1).tolist()))


def images_of(portraits: Sequence[Portrait]) -> Tensor:
    """Return portraits as a model reads them: [N, C, S, S] in [-1, 1]."""
    return to_float(torch.from_numpy(np.stack([cut.pixels for cut in portraits])))


def description(model: Model, sliders: Sequence[Slider]) -> dict[str, str]:
    """Say of which model and which sliders a picture is, as its PNG carries it; `fader edit` takes the sliders so."""
    registered = model.card.get("registered", {})
    version = registered.get("version") or f"{model.card['images_seen']:,} images, commit {model.card['commit']}"
    return {
        "Software": OURS,
        "Model": model.source,
        "Version": str(version),
        "Sliders": " ".join(f"{slider.name(model.attributes)}={slider.value:g}" for slider in sliders),
    }


def pixels_of(image: Tensor) -> np.ndarray:
    """Return [3 or 1, S, S] in [-1, 1] as uint8 [S, S, 3]."""
    return to_uint8(image.expand(1, 3, -1, -1))[0].cpu().numpy()


def paste(portrait: Portrait, pixels: np.ndarray) -> Image.Image:
    """Return the whole photo with an edited face, uint8 [S, S, 3], in its place, fading into the photo at its edge."""
    size, frame, photo = len(pixels), portrait.frame, portrait.photo.copy()
    middle, reach = frame(complex(size - 1, size - 1) / 2), abs(frame.factor) * size
    left, top = (max(0, int(at - reach)) for at in (middle.real, middle.imag))
    right, bottom = min(photo.width, int(middle.real + reach) + 1), min(photo.height, int(middle.imag + reach) + 1)
    x, y = np.meshgrid(np.arange(left, right), np.arange(top, bottom))
    points, (first, last) = frame.inverse()(x + 1j * y), portrait.shown
    from_first, from_last = points - first, last - points
    inside = np.minimum.reduce([from_first.real, from_first.imag, from_last.real, from_last.imag])
    alpha = np.clip(inside / (SOFT_EDGE * size), 0, 1)
    mask = Image.fromarray((255 * alpha * alpha * (3 - 2 * alpha)).round().astype(np.uint8))
    photo.paste(_warped(pixels, frame.inverse() @ Similarity(1, complex(left, top)), mask.size), (left, top), mask)
    return photo


def _warped(pixels: np.ndarray, source: Similarity, size: tuple[int, int]) -> Image.Image:
    """Return a picture of `size` whose pixel z shows source(z) of a square, which is averaged where it shrinks."""
    small = max(1, min(len(pixels), round(len(pixels) / abs(source.factor))))  # Pillow's warp samples single pixels
    square = Image.fromarray(pixels).resize((small, small), Image.Resampling.BOX)
    scale, half = small / len(pixels), complex(1, 1) / 2
    source = Similarity(scale, (scale - 1) * half) @ source
    factor, shift = source.factor, source.shift + half - source.factor * half  # Pillow counts from a pixel's corner
    matrix = (factor.real, -factor.imag, shift.real, factor.imag, factor.real, shift.imag)
    return square.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def free_stem(stem: str, is_taken: Callable[[str], bool]) -> str:
    """Return the stem, or with the first of -2, -3 … appended with which it is not taken."""
    name, number = stem, 2
    while is_taken(name):
        name, number = f"{stem}-{number}", number + 1
    return name
