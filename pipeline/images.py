"""Image bytes to uint8 squares to [-1, 1] and back: decoding, crop and resize rules, flips, grids, PNG bytes.

The rules are those of the official code: CelebA's 178x218 pictures lose 20 rows above and below, the 178 square is resized and
rounded to uint8, and only then mapped to [-1, 1]. There is one kernel each way, the same in every decoder: Lanczos when the
picture grows, an antialiased triangle when it shrinks.
Source: facebookresearch/FaderNetworks data/preprocess.py (the crop); the kernels are ours, see `kernel`.
"""

from __future__ import annotations

import functools
import io
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

if TYPE_CHECKING:  # only tensor methods are used, so that processes which just read bytes need not load torch
    from torch import Tensor

CELEBA_SIZE = (178, 218)
MAX_PIXELS = 89_478_485
"""Pillow's own limit, above which a picture is taken for a decompression bomb (256 MiB of RGB)."""
READABLE = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
Check = Literal["full", "header"]
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: a long text does not damage the picture beside it
_ORIENTATION = 0x0112
_UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TURNS = {number: Image.Transpose[name] for number, name in enumerate(_UPRIGHT, 2)}
"""What makes a picture of each Exif orientation upright. Source: TIFF 6.0, tag 274."""
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error)
_DAMAGE += (Image.DecompressionBombError,)


def _celeba_boxes(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    wrong = (width != CELEBA_SIZE[0]) | (height != CELEBA_SIZE[1])
    if wrong.any():
        size = f"{width[wrong][0]}x{height[wrong][0]}"
        raise ValueError(f"crop 'celeba' needs 178x218 pictures, found {size}; set crop: center for other pictures")
    one = np.ones_like(width)
    return np.stack([0 * one, 20 * one, 178 * one, 198 * one], 1)


def _center_boxes(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    side = np.minimum(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return np.stack([left, top, left + side, top + side], 1)


def _whole_boxes(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    return np.stack([0 * width, 0 * height, width, height], 1)


CROPS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "celeba": _celeba_boxes,
    "center": _center_boxes,
    "letterbox": _whole_boxes,
}
"""Crop rules by name: (widths [N], heights [N]) to boxes [N, 4] (left, top, right, bottom)."""


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded picture becomes a network's input. Two models with equal values read pictures alike.

    image_size: pixels a side of the result.
    crop: a name in CROPS: "celeba" (rows 20:-20 of 178x218), "center" (the largest centred square), or "letterbox" (the whole
        picture, its long side image_size, centred on black). Nothing is ever distorted. channels: 3 for colour, 1 for grey.
    Raises ValueError: a value is not possible.
    """

    image_size: int
    crop: str = "celeba"
    channels: int = 3

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1 pixel")
        if self.crop not in CROPS:
            raise ValueError(f"unknown crop {self.crop!r}; there are: {', '.join(CROPS)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; pictures have 3 (colour) or 1 (grey)")

    def boxes(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """What is cut out of pictures of these sizes: [N, 4] int64, (left, top, right, bottom); square, or the whole picture
        under "letterbox".
        Raises ValueError: the crop rule does not take a size; the message names it."""
        return CROPS[self.crop](np.asarray(widths, np.int64), np.asarray(heights, np.int64))

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        left, top, right, bottom = self.boxes(np.array([width]), np.array([height]))[0].tolist()
        return left, top, right, bottom

    def fitting(self, width: int, height: int) -> Preprocessing:
        """Return the same, or with the crop "center" where the crop rule does not take a picture of this size."""
        try:
            self.box(width, height)
        except ValueError:
            return replace(self, crop="center")
        return self

    def resized(self, boxes: np.ndarray) -> np.ndarray:
        """The width and height that each box [N, 4] is resized to: [N, 2] int64, the longer of them image_size."""
        sides = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)
        longest = sides.max(1, keepdims=True)
        return np.maximum(1, (2 * sides * self.image_size + longest) // (2 * longest))

    def margins(self, sizes: np.ndarray) -> np.ndarray:
        """Where a resized box of [N, 2] (width, height) begins in the square: [N, 2] (left, top), centred."""
        return (self.image_size - sizes) // 2


def kernel(side: int, image_size: int) -> Literal["lanczos", "triangular", "none"]:
    """The one resize kernel for a box whose longer side is `side` pixels and becomes `image_size`.
    Pillow calls the antialiased triangle BILINEAR; DALI calls it triangular with antialias on. Neither the area filter of OpenCV,
    which the official code used to shrink, nor its Lanczos of 8 taps exists in both."""
    if side == image_size:
        return "none"
    return "lanczos" if side < image_size else "triangular"


_PILLOW_KERNELS = {"lanczos": Image.Resampling.LANCZOS, "triangular": Image.Resampling.BILINEAR}


def _open(data: bytes | memoryview | np.ndarray, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture with only its header read."""
    image = Image.open(io.BytesIO(data), formats=READABLE)
    if image.width * image.height > most_pixels:
        raise ValueError(f"it declares {image.width}x{image.height} pixels, more than the {most_pixels:,} allowed")
    return image


def _unreadable(data: bytes | memoryview | np.ndarray, error: Exception) -> ValueError:
    reason = "its bytes are no known picture format" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"not a readable picture ({len(data):,} bytes): {reason}")


def _orientation(image: Image.Image) -> int:
    """Which way up a loaded picture is stored: 1 to 8, as Exif's tag says, or XMP's where there is no such tag.
    A tag of another type or value says nothing, and neither does metadata that cannot be read: 1."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def decode(data: bytes | memoryview | np.ndarray, orientation: int | None = None, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture wholly, turn it upright, and make it RGB.
    orientation: how it is stored, 1 to 8, where that is known; 1 leaves it as it is stored. None: as it says itself.
    most_pixels: that it may declare, up to MAX_PIXELS.
    Raises ValueError: the bytes are not a picture of a known format, are damaged or cut short, or declare too many pixels."""
    try:
        image = _open(data, most_pixels)
        image.load()
        turn = _TURNS.get(_orientation(image) if orientation is None else orientation)
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I"):  # 16 bits a pixel, of which Pillow would cut off what is above 255
            upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return upright.convert("RGB")
    except _DAMAGE as error:
        raise _unreadable(data, error) from error


class Checked(NamedTuple):
    """What is known of a picture that decodes. width, height: upright. orientation: 1 to 8. format: in Pillow's words."""

    width: int
    height: int
    orientation: int
    format: str


def check(data: bytes, depth: Check = "full") -> Checked:
    """Prove that a picture can be decoded, and read which way up it is stored.

    A JPEG is decoded at an eighth of its size: every coefficient is still read from the bit stream, which is the only part that
    can fail; the inverse transform and the colours, which cannot, are spared.
    depth: "header" reads of a JPEG or WebP only the header and looks for the end, at a fifth of the time: a picture that was cut
        short is found, one that is damaged inside is not.
    """
    # Most pictures of a set begin with the same bytes, up to the first that may start the pixels.
    plain = _plain_jpeg(data[: data.find(_PIXELS) + 10]) if depth == "header" else None
    if plain and _has_end(data, "JPEG"):
        return plain
    try:
        image = _open(data)
        width, height = image.size
        if depth == "header" and not _has_end(data, image.format):
            raise ValueError("it is cut short")
        if depth == "full" or image.format == "PNG":  # whose Exif may follow the pixels
            image.draft("L", (1, 1))
            image.load()
        orientation = _orientation(image)
        if orientation >= 5:
            width, height = height, width
        return Checked(width, height, orientation, image.format or "")
    except _DAMAGE as error:
        raise _unreadable(data, error) from error


_FRAMES = (0xC0, 0xC1, 0xC2)  # SOF of a baseline, extended or progressive JPEG
_PIXELS = b"\xff\xda"
_PLAIN = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # before it: Huffman and quantisation tables, restarts, JFIF, comments


@functools.lru_cache(maxsize=256)
def _plain_jpeg(data: bytes) -> Checked | None:
    """Return what is known of a JPEG without metadata that may turn it, in a twentieth of the time that Pillow takes to open it;
    None for everything else.
    Source: ITU-T T.81, B.1 and B.2.2."""
    at, size = 2, None
    if data[:2] != b"\xff\xd8":
        return None
    while at + 9 < len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if kind == 0xDA:  # the pixels; metadata may stand right before them, too
            return size
        if kind in _FRAMES and size is None:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            sound = data[at + 4] == 8 and data[at + 9] in (1, 3) and length == 8 + 3 * data[at + 9]
            size = Checked(width, height, 1, "JPEG") if sound and width and height and width * height <= MAX_PIXELS else None
        elif kind not in _PLAIN:
            return None
        at += 2 + length
    return None


_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # not the zero or the restart that may stand inside a scan
_PNG_END = b"IEND\xaeB`\x82"


def _has_end(data: bytes, kind: str | None) -> bool:
    """Whether the mark of a picture's end is there, whatever follows it. Formats that have none pass."""
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if kind == "PNG":
        return _PNG_END in data
    if kind not in ("JPEG", "MPO") or data.endswith(b"\xff\xd9"):
        return True
    marker = _MARKER.search(data, 2)
    while marker and data[marker.end() - 1] != 0xD9:  # segment by segment: a thumbnail inside one has an end of its own
        length = int.from_bytes(data[marker.end() : marker.end() + 2])
        marker = _MARKER.search(data, marker.end() + length)
    return marker is not None


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Crop, then resize with one kernel, rounded to uint8, centred on black: [image_size, image_size, channels].
    Raises ValueError: the crop rule does not take the picture's size."""
    boxes = preprocessing.boxes(np.array([image.width]), np.array([image.height]))
    sizes = preprocessing.resized(boxes)
    (box,), ((width, height),) = boxes.tolist(), sizes.tolist()
    size = preprocessing.image_size
    image = image.crop(box)
    name = kernel(max(image.size), size)
    if name != "none":
        image = image.resize((width, height), _PILLOW_KERNELS[name])
    array = np.asarray(image.convert("RGB" if preprocessing.channels == 3 else "L"))
    array = array.reshape(height, width, preprocessing.channels)
    if width == height:
        return array
    out = np.zeros((size, size, preprocessing.channels), np.uint8)
    left, top = preprocessing.margins(sizes)[0].tolist()
    out[top : top + height, left : left + width] = array
    return out


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, S, S, C] (as decoders give it) or [N, C, S, S] to float32 [N, C, S, S] in [-1, 1]: x / 127.5 - 1; stored
    in the order that it came in."""
    if images.ndim != 4 or images.is_floating_point():
        raise ValueError(f"pictures are {images.dtype} {tuple(images.shape)}; uint8 [N, S, S, C] or [N, C, S, S] is needed")
    if images.shape[1] == images.shape[2] and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [N, C, S, S] in [-1, 1] (clamped) to uint8 [N, S, S, C], rounded; undoes `to_float` exactly."""
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous()


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """images [N, C, S, S], mirrored left to right where mask [N] bool is true."""
    return images.flip(-1).where(mask.view(-1, 1, 1, 1), images)


def grid(images: Tensor, gap: int = 2) -> np.ndarray:
    """Pictures [R, C, 3 or 1, S, S] float in [-1, 1] as one uint8 picture [height, width, 3], white between them."""
    rows, columns, channels, size, _ = images.shape
    cells = to_uint8(images.reshape(-1, channels, size, size)).cpu().numpy().reshape(rows, columns, size, size, channels)
    cells = np.broadcast_to(cells, (*cells.shape[:4], 3))
    framed = np.pad(cells, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    joined = framed.swapaxes(1, 2).reshape(rows * (size + gap), columns * (size + gap), 3)
    return np.pad(joined, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def jpeg_bytes(picture: Image.Image, quality: int, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, **options)
    return out.getvalue()


def png_bytes(array: np.ndarray, said: Mapping[str, str] | None = None) -> bytes:
    """A uint8 picture [H, W, 3] or [H, W] as PNG, with what is said of it as its text."""
    out, text = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, value in (said or {}).items():
        text.add_text(key, value)
    Image.fromarray(array).save(out, "PNG", pnginfo=text)
    return out.getvalue()
