"""Find faces in photos, and turn, scale and cut them to CelebA's geometry.

There are two steps. A cascade, which detects upright faces, searches the photo turned by several angles; all windows that
it takes for the same face vote on its place, size and turn. Then an aligner, where there is one, corrects it: a small
network (fader/methods/aligner.py) that sees the face as framed so far and says by which similarity it is off, in three
rounds. The result is always one warp of the photo's own pixels.

Coordinates are pixels as OpenCV and CelebA's landmark file count them: 0 is the centre of the first pixel.

Source of the cascade: Viola, Jones 2001; Lienhart, Maydt 2002; as OpenCV ships it (frontalface_alt2).
"""

import cmath
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fader.method import Aligns
from fader.similarity import Similarity
from pipeline.images import CELEBA_SIZE, to_float
from pipeline.models import Model, load

EYES = (complex(69, 111), complex(108, 111))
"""CelebA's eyes, the left one in the picture first, in pixels of 178x218."""
ROUNDS = 3

_SIDE, _LARGE_SIDE = 400, 1200  # the photo is searched at these sizes of its longer side
_MIN_FACE = 32  # pixels a side of a face box at that size: 8% and 2.7% of the photo's longer side
_TURNS = (0, -15, 15, -30, 30, -45, 45)
_STEP, _FINE_STEP = 1.15, 1.06  # between the scales that are searched, in the first and in the fine search
_SAME_FACE, _SAME_SIDE = 0.4, 1.5  # boxes of one face: centres within this share of a side, sides within this factor
# Of 100 planted CelebA training pictures most had 17 to 133 votes in the first search, and false faces up to 10. In the
# fine search, which takes place where no face is sure, two true faces had 9 and 18 votes and a false one 12.
_SURE_VOTES, _FEW_VOTES = 15, 8
_UPRIGHT_VOTES = 3  # of the one turn
_MOVING_SIDE, _NEAR_SIDE = 240, 120  # a moving picture is searched at these sizes, whole and around the face of before
_MAX_SIDE = 32_000  # OpenCV's warp counts pixels in 16 bits
# Where the eyes stand in a face cascade's box, in shares of its side; medians over 150 CelebA training pictures.
_EYES_IN_BOX = (complex(0.308, 0.377), complex(0.689, 0.377))

NO_FACE = (
    "no face found: it must be seen from the front, turned by no more than some 45 degrees, and measure at least "
    f"{_MIN_FACE / _LARGE_SIDE:.0%} of the photo's longer side"
)
Detector = Callable[[np.ndarray], "list[Face]"]


@dataclass(frozen=True)
class Face:
    """A face in a photo. frame: from CelebA's pixels to the photo's. sure: the detector saw it clearly."""

    frame: Similarity
    sure: bool = True

    @property
    def eyes(self) -> tuple[complex, complex]:
        return self.frame(EYES[0]), self.frame(EYES[1])

    @property
    def size(self) -> float:
        """Photo pixels a pixel of the crop."""
        return abs(self.frame.factor)


def opencv() -> ModuleType:
    """Return OpenCV, which works on this thread alone.
    Raises ValueError: it is not installed, or is a version without cascades."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"faces are found by OpenCV ({error}): pip install 'attribute-sliders[align]'") from None
    if not hasattr(cv2, "CascadeClassifier"):
        raise ValueError(f"OpenCV {cv2.__version__} has no cascades: pip install 'opencv-python-headless<5'")
    cv2.setNumThreads(1)
    return cv2


def find(photo: np.ndarray, aligner: Model | None = None, detector: Detector | None = None) -> list[Face]:
    """Find the faces of a photo, largest first.
    photo: uint8 [H, W, 3]. aligner: a model that can align, to refine what the detector found.
    detector: finds faces; by default `cascade`.
    Raises ValueError: the photo is too long for OpenCV, or the model does not align."""
    if max(photo.shape[:2]) > _MAX_SIDE:
        raise ValueError(f"it is {photo.shape[1]}x{photo.shape[0]}; up to {_MAX_SIDE:,} pixels a side can be aligned")
    faces = (detector or cascade)(photo)
    if aligner is not None and faces:
        faces = refine(photo, faces, aligner)
    return sorted(faces, key=lambda face: -face.size)


def cascade(photo: np.ndarray) -> list[Face]:
    """Find faces in a photo, uint8 [H, W, 3], with OpenCV's face cascade alone.
    Where no face gets enough votes, a photo that is at least twice as large as what is searched is searched again for small
    faces; then with finer steps for the one face that gets some votes at least."""
    faces = _search(photo, _SIDE, _STEP, _SURE_VOTES)
    if not faces and max(photo.shape[:2]) >= 2 * _SIDE:
        faces = _search(photo, _LARGE_SIDE, _STEP, _SURE_VOTES)
    return faces or [Face(face.frame, sure=False) for face in _search(photo, _SIDE, _FINE_STEP, _FEW_VOTES)[:1]]


def upright(photo: np.ndarray) -> list[Face]:
    """Find faces that stand upright, in a small part of the time that `cascade` takes: for pictures that move."""
    return _search(photo, _MOVING_SIDE, _STEP, _UPRIGHT_VOTES, turns=(0,))


def follow(photo: np.ndarray, last: Face | None) -> list[Face]:
    """Find an upright face where it was in the picture before, or within half a face of there; else as `upright` does."""
    if last is not None:
        left, right = last.eyes
        reach = abs(right - left) / (_EYES_IN_BOX[1] - _EYES_IN_BOX[0]).real
        middle = (left + right) / 2 + complex(0, reach / 8)
        top, start = max(0, int(middle.imag - reach)), max(0, int(middle.real - reach))
        part = photo[top : int(middle.imag + reach), start : int(middle.real + reach)]
        faces = _search(part, _NEAR_SIDE, _STEP, _UPRIGHT_VOTES, turns=(0,)) if min(part.shape[:2]) >= _MIN_FACE else []
        if faces:
            return [Face(Similarity(1, complex(start, top)) @ face.frame) for face in faces]
    return upright(photo)


def _search(photo: np.ndarray, side: int, step: float, enough: int, turns: Sequence[float] = _TURNS) -> list[Face]:
    """Return faces of at least `enough` votes, the most first, in a photo whose longer side is shrunk to `side`."""
    cv2 = opencv()
    height, width = photo.shape[:2]
    shrink = min(1.0, side / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    grey = cv2.cvtColor(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    to_photo = Similarity(complex(1 / shrink), complex(1, 1) * (0.5 / shrink - 0.5))
    return [Face(to_photo @ _mean(group)) for group in _groups(grey, step, turns) if _votes(group) >= enough]


@dataclass(frozen=True)
class _Box:
    """A window that the face cascade took for a face, in pixels of the upright picture. turn: in degrees."""

    center: complex
    side: float
    turn: float
    votes: int


@functools.cache
def _classifier() -> Any:
    cv2 = opencv()
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_alt2.xml")


def _boxes(grey: np.ndarray, degrees: float, step: float) -> list[_Box]:
    """Return the faces in a picture whose content stands `degrees` clockwise of upright."""
    height, width = grey.shape
    factor = cmath.exp(-1j * math.radians(degrees))
    sides = width * abs(factor.real) + height * abs(factor.imag), width * abs(factor.imag) + height * abs(factor.real)
    size = math.ceil(sides[0]), math.ceil(sides[1])
    middle = complex(width - 1, height - 1) / 2
    back = Similarity(factor, complex(size[0] - 1, size[1] - 1) / 2 - factor * middle).inverse()
    turned = _warp(grey, back, size, mirrored=False)  # a mirrored face is a face too
    windows, votes = _classifier().detectMultiScale2(turned, scaleFactor=step, minNeighbors=2, minSize=(_MIN_FACE, _MIN_FACE))
    boxes = [
        _Box(back(complex(x + (w - 1) / 2, y + (h - 1) / 2)), float(w), degrees, int(count))
        for (x, y, w, h), count in zip(windows, votes)
    ]
    return [box for box in boxes if 0 <= box.center.real < width and 0 <= box.center.imag < height]


def _groups(grey: np.ndarray, step: float, turns: Sequence[float] = _TURNS) -> list[list[_Box]]:
    """Group the boxes of each face, over all turns; the face of most votes comes first.
    A group around or inside a face of more votes is left out, because a cascade also takes an eye or a whole head for a face."""
    boxes = [box for turn in turns for box in _boxes(grey, turn, step)]
    groups: list[list[_Box]] = []
    for box in sorted(boxes, key=lambda box: -box.votes):
        for group in groups:
            small, large = sorted((group[0].side, box.side))
            if abs(group[0].center - box.center) < _SAME_FACE * small and large < _SAME_SIDE * small:
                group.append(box)
                break
        else:
            groups.append([box])
    groups.sort(key=_votes, reverse=True)
    kept: list[list[_Box]] = []
    for group in groups:
        if all(abs(group[0].center - b[0].center) > 0.5 * max(group[0].side, b[0].side) for b in kept):
            kept.append(group)
    return kept


def _votes(boxes: Sequence[_Box]) -> int:
    return sum(box.votes for box in boxes)


def _mean(boxes: Sequence[_Box]) -> Similarity:
    """Return the similarity from CelebA's pixels to a face: the mean of its boxes, weighted by their votes."""
    votes = [box.votes for box in boxes]
    center, side, turn = (
        sum(value * weight for value, weight in zip(values, votes)) / sum(votes)
        for values in ([b.center for b in boxes], [b.side for b in boxes], [b.turn for b in boxes])
    )
    across = side * cmath.exp(1j * math.radians(turn))
    left, right = (center + (eye - complex(0.5, 0.5)) * across for eye in _EYES_IN_BOX)
    return Similarity.between(EYES, (left, right))


def refine(photo: np.ndarray, faces: Sequence[Face], aligner: Model, rounds: int = ROUNDS) -> list[Face]:
    """Correct faces `rounds` times by what the aligner, which `check_aligner` must take, says of its window on them."""
    method = check_aligner(aligner)
    window = _square(aligner) @ method.window
    pixels = _pixels_of(method.window_size)
    for _ in range(rounds):
        views = [crop(photo, face.frame @ window @ pixels, (method.window_size,) * 2) for face in faces]
        with torch.inference_mode():
            off = method.align(to_float(torch.from_numpy(np.stack(views))))
        factors, shifts = off.factor.tolist(), off.shift.tolist()
        faces = [
            Face(face.frame @ window @ Similarity(factor, shift) @ window.inverse(), face.sure)
            for face, factor, shift in zip(faces, factors, shifts)
        ]
    return list(faces)


def load_aligner(source: str | None) -> Model | None:
    """Load a model that refines where faces are, or None; raise ValueError where it is not there or as `check_aligner` does."""
    if source is None:
        return None
    aligner = load(source)
    check_aligner(aligner)
    return aligner


def check_aligner(aligner: Model) -> Aligns:
    """Return the method that aligns.
    Raises ValueError: it does not align, or was trained on pictures that were not cut as CelebA's are."""
    method = aligner.aligning.method
    if aligner.preprocessing.channels != 3:
        raise ValueError(f"{aligner.source} reads grey pictures; an aligner of photos reads colour")
    _square(aligner)
    return method


def _square(aligner: Model) -> Similarity:
    """Return the similarity from coordinates of the aligner's training pictures, edges at -1 and 1, to CelebA's pixels."""
    try:
        left, top, right, bottom = aligner.preprocessing.box(*CELEBA_SIZE)
    except ValueError as error:
        raise ValueError(f"{aligner.source}: {error}") from None
    side = max(right - left, bottom - top)
    return Similarity(complex(side / 2), complex(left + right - 1, top + bottom - 1) / 2)


def _pixels_of(size: int) -> Similarity:
    """Return the similarity from pixels of a square to coordinates whose edges are at -1 and 1."""
    return Similarity(complex(2 / size), complex(1, 1) * (1 / size - 1))


def crop(photo: np.ndarray, frame: Similarity, size: tuple[int, int] = CELEBA_SIZE) -> np.ndarray:
    """Cut a face out by one warp of the photo's pixels: uint8 [height, width, 3].
    Where the picture shrinks, samples are averaged, enough of them that no pixel of the photo is skipped. Where it grows, they
    are cubic. Beyond the photo's edge the crop shows its mirror image.
    photo: uint8 [H, W, 3] or [H, W]. frame: from the crop's pixels to the photo's. size: of the crop, (width, height)."""
    cv2 = opencv()
    fine = max(1, math.ceil(abs(frame.factor) - 1e-6))
    samples = Similarity(complex(1 / fine), complex(1, 1) * (0.5 / fine - 0.5))
    warped = _warp(photo, frame @ samples, (size[0] * fine, size[1] * fine), cubic=abs(frame.factor) < 1)
    return warped if fine == 1 else cv2.resize(warped, size, interpolation=cv2.INTER_AREA)


def _warp(
    picture: np.ndarray, source: Similarity, size: tuple[int, int], cubic: bool = False, mirrored: bool = True
) -> np.ndarray:
    """Return a picture of `size` (width, height) whose pixel z shows source(z) of `picture`.
    Beyond the edge of `picture` it shows the mirror image, or else the nearest pixel."""
    cv2 = opencv()
    a, b = source.factor, source.shift
    matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR)
    border = cv2.BORDER_REFLECT_101 if mirrored else cv2.BORDER_REPLICATE
    return cv2.warpAffine(picture, matrix, size, flags=flags, borderMode=border)


def thumbnail(photo: np.ndarray, face: Face, height: int) -> np.ndarray:
    """Shrink a photo onto white in CelebA's proportions, uint8 [height, width, 3], and draw the crop's outline."""
    cv2 = opencv()
    width = round(height * CELEBA_SIZE[0] / CELEBA_SIZE[1])
    shrink = min(width / photo.shape[1], height / photo.shape[0])
    size = max(1, int(photo.shape[1] * shrink)), max(1, int(photo.shape[0] * shrink))
    small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA if shrink < 1 else cv2.INTER_LINEAR)
    right, bottom = CELEBA_SIZE[0] - 1, CELEBA_SIZE[1] - 1
    corners = [face.frame(complex(x, y)) * shrink for x, y in ((0, 0), (right, 0), (right, bottom), (0, bottom))]
    outline = np.array([[round(corner.real), round(corner.imag)] for corner in corners], np.int32)
    cv2.polylines(small, [outline], True, (255, 220, 0), 1, cv2.LINE_AA)
    out = np.full((height, width, 3), 255, np.uint8)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    out[top : top + size[1], left : left + size[0]] = small
    return out
