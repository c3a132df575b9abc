"""Drawing a face or a fruit: a pen for smooth shapes, and the parts of a face from the hair behind to the glasses before it."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace as Person

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from pipeline.data.datasets.person import HEIGHT, WIDTH, Color, mix

_SCALE = 3  # drawn this much larger, then averaged down
_CENTER = (88.5, 118.0)
_STEPS = 8
_T = np.arange(_STEPS)[:, None] / _STEPS
_SPLINE = np.hstack([_T, _T**2, _T**3, 0 * _T + 1]) @ [[-0.5, 0, 0.5, 0], [1, -2.5, 2, -0.5], [-0.5, 1.5, -1.5, 0.5],
    [0, 1, 0, 0]]
_NEIGHBOURS = np.array([-1, 0, 1, 2])
_CAP = np.array([(math.cos(a), math.sin(a)) for a in (math.pi / 4, math.pi / 2, 3 * math.pi / 4)])
_CIRCLE = np.stack([np.cos(np.arange(32) * math.pi / 16), np.sin(np.arange(32) * math.pi / 16)], 1)
Points = list[tuple[float, float]]


class _Pen:
    """Draws smooth shapes in the face's own coordinates: pixels from the point between the eyes, before the pose.

    Source of the curve: Catmull and Rom 1974, "A class of local interpolating splines".
    """

    def __init__(self, image: Image.Image, person: Person) -> None:
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.unit = person.scale * _SCALE
        c, s = math.cos(person.angle) * self.unit, math.sin(person.angle) * self.unit
        self.matrix = np.array([[c, s], [-s, c]])
        pivot = np.array(_CENTER) + person.shift
        self.origin = pivot * _SCALE + np.array([0, 111 - _CENTER[1]]) @ self.matrix

    def _place(self, points: np.ndarray) -> list[float]:
        return (points @ self.matrix + self.origin).ravel().tolist()

    def polygon(self, points: Points, fill: tuple[int, ...]) -> None:
        self.draw.polygon(self._place(np.array(points)), fill)

    def _closed(self, points: Points) -> np.ndarray:
        p, n = np.array(points), len(points)
        return (_SPLINE @ p[(np.arange(n)[:, None] + _NEIGHBOURS) % n]).reshape(-1, 2)

    def shape(self, points: Points, fill: tuple[int, ...]) -> None:
        """A smooth closed curve through the points, filled."""
        self.draw.polygon(self._place(self._closed(points)), fill)

    def ring(self, points: Points, width: float, fill: tuple[int, ...]) -> None:
        """A smooth closed curve through the points, as a line."""
        curve = self._closed(points)
        along = np.roll(curve, -1, 0) - np.roll(curve, 1, 0)
        across = along[:, ::-1] * (-1, 1) * (width / 2 / np.hypot(along[:, :1], along[:, 1:]))
        outer, inner = curve + across, curve - across
        self.draw.polygon(self._place(np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])), fill)

    def stroke(self, points: Points, width: float, fill: tuple[int, ...]) -> None:
        """A smooth open curve through the points, as a line with round ends."""
        p = np.array(points)
        p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        around = p[np.arange(1, len(p) - 2)[:, None] + _NEIGHBOURS]
        curve = np.concatenate([(_SPLINE @ around).reshape(-1, 2), p[-2:-1]])
        along = np.empty_like(curve)
        along[1:-1], along[0], along[-1] = curve[2:] - curve[:-2], curve[1] - curve[0], curve[-1] - curve[-2]
        along *= width / 2 / np.hypot(along[:, :1], along[:, 1:])
        across = along[:, ::-1] * (-1, 1)
        end = curve[-1] + _CAP @ np.stack([across[-1], along[-1]])
        start = curve[0] - _CAP @ np.stack([across[0], along[0]])
        self.draw.polygon(self._place(np.concatenate([curve + across, end, (curve - across)[::-1], start])), fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: tuple[int, ...]) -> None:
        self.draw.polygon(self._place(_CIRCLE * (rx, ry) + (x, y)), fill)


def _mirrored(right: Points) -> Points:
    """A closed outline from its right half, given from top to bottom; points on the axis are not doubled."""
    return right + [(-x, y) for x, y in reversed(right) if x]


def _darker(color: Color, by: float) -> Color:
    return mix(color, (20, 10, 16), by)


def _lighter(color: Color, by: float) -> Color:
    return mix(color, (255, 250, 240), by)


def draw(p: Person, labels: dict[str, int]) -> Image.Image:
    return draw_dressed(p, labels, [p])[0]


def draw_dressed(p: Person, labels: dict[str, int], others: Sequence[Person]) -> list[Image.Image]:
    """Draw a person once for each of some others who are like him but for a hat and glasses; what lies below is drawn once."""
    image = _background(p)
    pen = _Pen(image, p)
    hair = p.blond if labels["Blond_Hair"] else p.not_blond
    look = 3.2 * p.yaw  # features move with the head's turn, and stand out of its plane
    _hair_behind(pen, p, hair)
    _body(pen, p)
    _head(pen, p)
    if labels["Beard"] == 2:
        _beard(pen, p, _beard_color(p, hair), look)
    _mouth(pen, p, look, bool(labels["Smiling"]))
    _nose(pen, p, 1.4 * look)
    if labels["Beard"]:
        _moustache(pen, _beard_color(p, hair), look)
    for side in (-1, 1):
        _eye(pen, p, look, side, bool(labels["Smiling"]))
        _brow(pen, p, hair, look, side)
    _hair_before(pen, p, hair)
    light, dressed = _light(p), []
    for other in others:
        picture = image.copy()
        pen = _Pen(picture, p)
        if labels["Wearing_Hat"]:
            _HAT_KINDS[other.hat_kind](pen, other)
        if labels["Eyeglasses"]:
            _glasses(pen, other, look)
        dressed.append(ImageChops.multiply(picture.reduce(_SCALE), light))
    return dressed


def draw_fruit(p: Person, look: Person, orange: int) -> Image.Image:
    """Draw an apple or an orange at a person's place, in his light and before his background."""
    image = _background(p)
    pen, color, radius = _Pen(image, p), look.colors[orange], 1.35 * p.cheek
    toward = (-4 * math.cos(p.light_angle), -4 * math.sin(p.light_angle))
    half = [(0, -0.98), (0.5, -0.85), (0.85, -0.5), (0.98, 0), (0.85, 0.5), (0.5, 0.85), (0, 0.98)]
    if not orange:
        half = [(0, -0.72), (0.3, -0.95), (0.7, -0.9), (1, -0.3), (0.86, 0.4), (0.45, 0.95), (0, 0.86)]
    outline = [(x * radius, y * radius) for x, y in _mirrored(half)]
    pen.ellipse(0, 0.95 * radius, radius, radius / 6, (10, 10, 20, 80))
    pen.shape(outline, _darker(color, 0.3))
    pen.shape([(0.92 * x + toward[0], 0.92 * y + toward[1]) for x, y in outline], color)
    pen.ellipse(0.4 * radius * toward[0] / 4, 0.4 * radius * toward[1] / 4, radius / 4, radius / 5, (255, 255, 255, 60))
    if orange:
        for x, y in look.pores:
            if math.hypot(x, y) < 0.85:
                pen.ellipse(x * radius, y * radius, 1, 1, (*_darker(color, 0.35), 150))
        pen.ellipse(radius * look.lean / 4, -0.8 * radius, 4, 3, (84, 112, 40))
    else:
        top = (12 * look.lean, -1.25 * radius)
        pen.stroke([(0, -0.7 * radius), (4 * look.lean, -radius), top], 4, (84, 54, 30))
        if look.leaf:
            pen.shape([(2, -0.95 * radius), (14, -1.25 * radius), (34, -1.2 * radius), (18, -0.98 * radius)], (70, 132, 50))
    return ImageChops.multiply(image.reduce(_SCALE), _light(p))


def _ramp(angle: float) -> np.ndarray:
    """[5, 4] numbers in [0, 1] that grow in one direction."""
    y, x = np.mgrid[-1:1:5j, -1:1:4j]
    return (x * math.cos(angle) + y * math.sin(angle)) / 2 / math.sqrt(2) + 0.5


def _background(p: Person) -> Image.Image:
    first, second = (np.array(color) for color in p.background)
    ramp = first + (second - first) * _ramp(p.background_angle)[..., None]
    image = Image.fromarray(ramp.round().astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image = image.resize((WIDTH * _SCALE, HEIGHT * _SCALE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image, "RGBA")
    for x, y, radius in p.spots:
        box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
        draw.ellipse(box, (*_lighter(p.background[1], 0.3), 70))
    return image


def _light(p: Person) -> Image.Image:
    ramp = 255 * (1 - p.light * _ramp(p.light_angle))
    grey = Image.fromarray(ramp.round().astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return Image.merge("RGB", (grey, grey, grey))


def _body(pen: _Pen, p: Person) -> None:
    neck, top = p.jaw * 0.66, p.chin + 2
    pen.shape([(-96, 150), (-82, top + 16), (-46, top + 4), (-neck, top - 4), (neck, top - 4), (46, top + 4),
        (82, top + 16), (96, 150)], p.clothes)
    pen.polygon([(-neck, 40), (neck, 40), (neck + 3, top + 2), (neck - 2, top + 9), (0, top + 15),
        (2 - neck, top + 9), (-neck - 3, top + 2)], _darker(p.skin, 0.22))
    pen.stroke([(-neck - 4, top + 1), (-neck * 0.6, top + 12), (0, top + 16), (neck * 0.6, top + 12),
        (neck + 4, top + 1)], 3, _darker(p.clothes, 0.3))


def _outline(p: Person, grow: float = 0.0) -> Points:
    right = [(0, -50 - grow), (24, -46 - grow), (p.cheek - 3, -24), (p.cheek + grow, 2), (p.cheek - 2 + grow, 25),
             (p.jaw + 3 + grow, 48 + grow / 2), (17 + grow / 2, p.chin - 5 + grow), (0, p.chin + grow)]  # fmt: skip
    return _mirrored(right)


def _head(pen: _Pen, p: Person) -> None:
    shade, toward = _darker(p.skin, 0.16), (-math.cos(p.light_angle), -math.sin(p.light_angle))
    for side in (-1, 1):
        x = side * (p.cheek + 2 - side * 2.5 * p.yaw)
        pen.ellipse(x, 12, 6.5, 11, shade)
        pen.ellipse(x - side, 12, 3.6, 7, _darker(p.skin, 0.3))
    pen.shape(_outline(p), shade)
    lit = [(x * 0.95 + toward[0] * 2.2, (y - 10) * 0.965 + 10 + toward[1] * 2.2) for x, y in _outline(p)]
    pen.shape(lit, p.skin)
    for side in (-1, 1):
        pen.ellipse(side * 25 + 3 * p.yaw, 25, 9, 6.5, (*mix(p.skin, (226, 84, 84), 0.55), 70))


def _hair_behind(pen: _Pen, p: Person, hair: Color) -> None:
    wide = p.cheek + p.volume
    bottom = max(p.length, 24)
    back = [(0, -60 - p.crown), (wide * 0.6, -53 - p.crown), (wide * 0.95, -30), (wide, -10),
        (wide + 2, bottom * 0.5), (wide - 1 + bottom * 0.06, bottom), (wide * 0.5, bottom + 3), (0, bottom)]
    pen.shape(_mirrored(back), _darker(hair, 0.28))


def _hair_before(pen: _Pen, p: Person, hair: Color) -> None:
    """The dome over the forehead down to the temples, a lock on each side, and a shine."""
    wide, top, s = p.cheek + p.volume, -60 - p.crown, p.side
    dome = [(-wide, -4), (-wide * 0.96, -30), (-wide * 0.62, top + 8), (0, top), (wide * 0.62, top + 8),
        (wide * 0.96, -30), (wide, -4), (p.cheek - 3, -8)]
    if p.hairline == 0:  # parted on one side
        front = [(p.cheek - 6, -22), (s * 4 + 14, -34), (s * 16, -44), (s * 4 - 14, -30), (6 - p.cheek, -22)]
    elif p.hairline == 1:  # a fringe
        front = [(p.cheek - 5, -17), (18, -19), (5, -22), (-8, -18), (-20, -20), (5 - p.cheek, -17)]
    elif p.hairline == 2:  # parted in the middle
        front = [(p.cheek - 6, -20), (16, -34), (0, -46), (-16, -34), (6 - p.cheek, -20)]
    else:  # combed back
        front = [(p.cheek - 6, -24), (22, -38), (0, -41), (-22, -38), (6 - p.cheek, -24)]
    pen.shape([*dome, *front, (3 - p.cheek, -8)], hair)
    for side in (-1, 1):
        x, end = side * (p.cheek - 1), p.length
        lock = [(x - side * 3, -16), (x + side * (p.volume - 1), -20), (side * wide, end * 0.45),
            (side * (wide - 2), end), (x + side * 3, end + 4), (x - side * 1, end * 0.5)]
        pen.shape(lock, hair)
        pen.stroke([(x + side * 4, -14), (x + side * (p.volume * 0.6), end * 0.5), (x + side * 5, end - 2)],
            1.4, _darker(hair, 0.25))
    shine = [(-wide * 0.75, -32), (-wide * 0.5, top + 17), (0, top + 8), (wide * 0.5, top + 17), (wide * 0.75, -32)]
    pen.shape([*shine, *((x * 0.88, y + 7) for x, y in reversed(shine))], (*_lighter(hair, 0.4), 80))
    for x in (-0.55, 0.15, 0.6):
        pen.stroke([(wide * x * 0.7, top + 9), (wide * x * 1.1 + s * 3, -42)], 1.1, _darker(hair, 0.16))


def _eye(pen: _Pen, p: Person, look: float, side: int, smiling: bool) -> None:
    x, tall = side * 19.5 + look, 4.9 if smiling else 5.8
    pen.shape([(x - 9.5, 0.8), (x - 4, -tall), (x + 4, -tall), (x + 9.5, 0.8), (x + 4, tall - 0.6),
        (x - 4, tall - 0.6)], (250, 249, 246))
    pen.ellipse(x + p.gaze, -0.2, 4.7, 4.7, p.eyes)
    pen.ellipse(x + p.gaze, -0.2, 2.3, 2.3, (16, 14, 18))
    pen.ellipse(x + p.gaze + 1.6, -1.9, 1.3, 1.3, (255, 255, 255))
    lid = (40, 26, 26)
    pen.stroke([(x - 10, 1), (x - 4.5, -tall), (x + 4.5, -tall), (x + 10, 1)], 2.4 if p.lashes else 1.7, lid)
    if p.lashes:
        pen.stroke([(x + side * 8.5, -1), (x + side * 12.5, -4.5)], 1.6, lid)
    pen.stroke([(x - 8, 7.6), (x, 8.6), (x + 8, 7.6)], 1, _darker(p.skin, 0.2))


def _brow(pen: _Pen, p: Person, hair: Color, look: float, side: int) -> None:
    x, color = side * 19.5 + look, _darker(mix(hair, p.skin, 0.1), 0.35)
    pen.stroke([(x - side * 10, -13), (x + side * 1, -16.5), (x + side * 11.5, -12.5)], p.brow, color)


def _nose(pen: _Pen, p: Person, look: float) -> None:
    shade, w = _darker(p.skin, 0.2), p.nose
    pen.shape([(look - 2, 2), (look + 2, 2), (look + w * 0.6, 18), (look + w, 24), (look, 28), (look - w, 24),
        (look - w * 0.6, 18)], (*shade, 110))
    pen.shape([(look - 1.5, 4), (look + 1.5, 4), (look + 3, 20), (look, 24), (look - 3, 20)], _lighter(p.skin, 0.16))
    for side in (-1, 1):
        pen.ellipse(look + side * w * 0.5, 24.6, 1.9, 1.4, _darker(p.skin, 0.55))


def _mouth(pen: _Pen, p: Person, look: float, smiling: bool) -> None:
    x, m = look, p.mouth
    if not smiling:
        w = 14.5 * m
        pen.shape([(x - w, 43), (x - 5, 38.5), (x, 40), (x + 5, 38.5), (x + w, 43), (x + 6, 47.5), (x - 6, 47.5)],
            p.lips)
        pen.stroke([(x - w, 43.4), (x - 5, 42.4), (x + 5, 42.4), (x + w, 43.4)], 1.5, _darker(p.lips, 0.5))
        return
    w = 24 * m
    pen.shape([(x - w, 34), (x - 12, 37.5), (x, 38.5), (x + 12, 37.5), (x + w, 34), (x + 15, 49), (x, 54.5),
        (x - 15, 49)], p.lips)
    pen.shape([(x - w + 3.5, 36.5), (x - 12, 40), (x, 41), (x + 12, 40), (x + w - 3.5, 36.5), (x + 13, 47),
        (x, 50.5), (x - 13, 47)], (96, 22, 30))
    pen.shape([(x - w + 4.5, 37.2), (x - 12, 40.4), (x, 41.4), (x + 12, 40.4), (x + w - 4.5, 37.2), (x + 12, 44.6),
        (x, 47), (x - 12, 44.6)], (253, 252, 248))
    for side in (-1, 1):
        fold = _darker(p.skin, 0.3)
        pen.stroke([(x + side * (w + 0.5), 32), (x + side * (w + 3.5), 35), (x + side * (w + 2), 39)], 1.4, fold)
        pen.stroke([(x + side * 13, 22), (x + side * 22, 27), (x + side * 27, 32)], 1.1, _darker(p.skin, 0.18))


def _beard_color(p: Person, hair: Color) -> Color:
    """A shade of the hair, dark enough to stand out from the skin."""
    color = mix(hair, (84, 46, 24), 0.5) if hair == p.blond else _darker(hair, 0.3)
    while sum(p.skin) - sum(color) < 230 and sum(color) > 75:
        color = _darker(color, 0.15)
    return color


def _moustache(pen: _Pen, color: Color, look: float) -> None:
    right = [(0, 30.5), (9, 28.5), (20, 33.5), (26, 40), (17, 39.5), (8, 38.6), (0, 37)]
    pen.shape([(x + look, y) for x, y in _mirrored(right)], color)


def _beard(pen: _Pen, p: Person, color: Color, look: float) -> None:
    """Along the jaw from the temples, below the mouth and beyond the chin; the cheeks stay free."""
    outer = [(p.cheek, 4), (p.cheek + 1, 26), (p.jaw + 6, 51), (20, p.chin + 4), (0, p.chin + 9)]
    inner = [(p.cheek - 5, 8), (p.cheek - 8, 24), (27, 32), (14, 31), (0, 33)]
    left = [(-x, y) for x, y in reversed(outer) if x] + [(-x, y) for x, y in inner]
    right = [(x, y) for x, y in reversed(inner) if x]
    points = outer + left + right
    pen.shape([(x + look * (0.7 if abs(x) < 30 and y < 40 else 0), y) for x, y in points], color)


def _glasses(pen: _Pen, p: Person, look: float) -> None:
    ends = []
    for side in (-1, 1):
        x = side * 19.8 + look
        rx, ry = ((15.5, 13), (16.5, 11.5), (17, 13))[p.lens_kind]
        if p.lens_kind == 0:
            rim = [(x + rx * math.cos(a), 1 + ry * math.sin(a)) for a in np.arange(10) * math.pi / 5]
        elif p.lens_kind == 1:
            rim = [(x - rx, -9), (x, -10.5), (x + rx, -9), (x + rx, 8), (x + 9, 12.5), (x - 9, 12.5), (x - rx, 8)]
        else:
            rim = [(x - side * 16, -9), (x, -11), (x + side * 17, -9), (x + side * 15, 7), (x + side * 3, 14),
                (x - side * 12, 9)]
        pen.shape(rim, p.lens)
        pen.ring(rim, 3.6, p.frame)
        pen.stroke([(x - 7, -5), (x - 2, -7.5)], 1.8, (255, 255, 255, 150))
        ends.append(x - side * rx)
        pen.stroke([(x + side * rx, -4), (side * (p.cheek + 3), 0)], 3.4, p.frame)
    pen.stroke([(ends[0], -2), (look, -5), (ends[1], -2)], 3.4, p.frame)


def _beanie(pen: _Pen, p: Person) -> None:
    wide, top = p.cheek + p.volume, -68 - p.crown
    pen.shape(_mirrored([(0, top), (wide * 0.68, top + 9), (wide, -38), (wide - 3, -28), (0, -30)]), p.hat)
    for x in (-0.6, -0.3, 0, 0.3, 0.6):
        pen.stroke([(x * wide * 0.8, top + 8 + abs(x) * 12), (x * wide * 1.1, -42)], 1.3, _darker(p.hat, 0.22))
    pen.shape(_mirrored([(0, -44), (wide * 0.6, -42), (wide + 2, -38), (wide + 3, -27), (wide - 2, -22),
        (wide * 0.6, -25), (0, -27)]), p.band)


def _cap(pen: _Pen, p: Person) -> None:
    wide, top, s = p.cheek + p.volume + 1, -65 - p.crown, p.side
    pen.shape(_mirrored([(0, top), (wide * 0.68, top + 9), (wide, -36), (wide - 1, -25), (0, -28)]), p.hat)
    pen.stroke([(0, top + 2), (4 * s, -50), (5 * s, -34)], 1.4, _darker(p.hat, 0.25))
    pen.ellipse(0, top + 1, 4, 2.6, _darker(p.hat, 0.2))
    pen.shape([(-wide * 0.84 + 6 * s, -33), (6 * s, -40), (wide * 0.84 + 6 * s, -33), (wide * 0.8 + 8 * s, -23),
        (8 * s, -19), (-wide * 0.8 + 8 * s, -23)], _darker(p.hat, 0.25))


def _fedora(pen: _Pen, p: Person) -> None:
    wide, top = p.cheek + p.volume * 0.8, -68 - p.crown
    pen.shape([(-wide, -30), (-wide + 4, top + 20), (-20, top), (0, top + 6), (20, top), (wide - 4, top + 20),
        (wide, -30), (0, -26)], p.hat)
    pen.polygon([(-wide - 1, -44), (wide + 1, -44), (wide + 2, -31), (-wide - 2, -31)], p.band)
    pen.shape([(-wide - 20, -31), (-wide * 0.6, -38), (wide * 0.6, -38), (wide + 20, -31), (wide * 0.7, -21),
        (-wide * 0.7, -21)], _darker(p.hat, 0.14))
    pen.polygon([(-wide + 1, -45), (wide - 1, -45), (wide, -34), (-wide, -34)], p.band)


def _bucket(pen: _Pen, p: Person) -> None:
    wide, top = p.cheek + p.volume, -66 - p.crown
    pen.shape([(-wide + 12, top), (wide - 12, top), (wide - 3, -44), (wide, -32), (-wide, -32), (3 - wide, -44)], p.hat)
    pen.shape([(-wide + 2, -42), (0, -44), (wide - 2, -42), (wide + 14, -22), (0, -24), (-wide - 14, -22)],
        _darker(p.hat, 0.18))
    pen.stroke([(-wide + 2, -42), (0, -44), (wide - 2, -42)], 2, p.band)


_HAT_KINDS: tuple[Callable[[_Pen, Person], None], ...] = (_beanie, _cap, _fedora, _bucket)
