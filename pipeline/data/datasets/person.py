"""The people of the drawn faces: what chance decides about a face, apart from its attributes."""

import math
from random import Random
from types import SimpleNamespace
from typing import Any

WIDTH, HEIGHT = 178, 218  # CelebA's
Color = tuple[int, int, int]

_SKINS = ((252, 226, 206), (241, 199, 168), (222, 170, 132), (188, 132, 96), (140, 94, 68))
_BLOND = ((238, 200, 110), (246, 222, 150), (222, 176, 84))
_NOT_BLOND = ((34, 28, 30), (62, 42, 30), (92, 60, 40), (116, 50, 32), (112, 114, 122))
_EYES = ((70, 44, 26), (52, 96, 140), (62, 112, 72), (96, 74, 44), (84, 96, 108))
_HATS = ((196, 48, 52), (38, 66, 140), (32, 112, 76), (118, 62, 140), (22, 126, 138), (222, 112, 40), (70, 74, 84),
    (228, 224, 214))
_CLOTHES = ((200, 70, 70), (60, 100, 170), (70, 140, 100), (230, 230, 225), (60, 60, 70), (220, 170, 80),
    (140, 90, 150))
_TINTS = ((255, 255, 255), (40, 50, 70), (250, 220, 170))
_FRAMES = ((24, 24, 28), (70, 36, 20), (26, 36, 84), (110, 20, 34))
_LENSES = ((255, 255, 255, 46), (210, 230, 255, 60), (30, 32, 40, 190), (70, 50, 30, 160))


def mix(a: Color, b: Color, t: float) -> Color:
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))  # type: ignore[return-value]


def person(chance: Random) -> SimpleNamespace:
    """Draw one person. Every number is drawn, in this order, whatever the labels are, so that labels change nothing else.

    Colours are RGB; lengths are pixels of a 178x218 picture, before the pose.
    """

    def pick(options: tuple) -> Any:
        return options[int(chance.random() * len(options))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * chance.random()

    def near(color: Color, by: float = 10) -> Color:
        return tuple(max(0, min(255, round(c + between(-by, by)))) for c in color)  # type: ignore[return-value]

    tone = between(0, len(_SKINS) - 1.001)
    skin = near(mix(_SKINS[int(tone)], _SKINS[int(tone) + 1], tone % 1), 5)
    hat = pick(_HATS)
    base = tuple(int(between(70, 225)) for _ in range(3))
    return SimpleNamespace(
        skin=skin,
        blond=near(pick(_BLOND)),
        not_blond=near(pick(_NOT_BLOND), 8),
        eyes=near(pick(_EYES)),
        hat=near(hat),
        band=near(pick(tuple(c for c in _HATS if c != hat))),
        clothes=near(pick(_CLOTHES), 20),
        frame=pick(_FRAMES),
        lens=pick(_LENSES),
        lips=near(mix(skin, (176, 54, 64), between(0.35, 0.75)), 6),
        background=(base, near(mix(base, pick(_TINTS), between(0.2, 0.6)), 30)),
        background_angle=between(0, 2 * math.pi),
        spots=tuple((between(0, WIDTH), between(0, HEIGHT), between(12, 42)) for _ in range(int(between(0, 6)))),
        light_angle=between(0, 2 * math.pi),
        light=between(0.05, 0.3),
        angle=math.radians(between(-9, 9)),
        scale=between(0.94, 1.06),
        shift=(between(-4, 4), between(-4, 4)),
        yaw=between(-1, 1),
        cheek=between(38, 44),  # half the width of the face at the eyes; then at the jaw; then the chin below the eyes
        jaw=between(27, 36),
        chin=between(69, 77),
        volume=between(9, 15),  # hair beside the face; then above it
        crown=between(9, 17),
        length=pick((10, 12, 16, 46, 54, 84, 92)) + between(-3, 5),  # y where the hair ends
        hairline=int(between(0, 4)),
        side=pick((-1, 1)),  # of the parting
        hat_kind=int(between(0, 4)),
        lens_kind=int(between(0, 3)),
        brow=between(3.4, 5.6),
        nose=between(6.5, 9.5),
        mouth=between(0.9, 1.1),
        lashes=chance.random() < 0.5,
        gaze=between(-1.6, 1.6),
    )
