"""Drawn apples and oranges in folders: a set of two domains whose truth is known, with no photograph in it.

One binary attribute, orange. Place, size, background and light are independent of it, so that the same fruit can be drawn
again as the other one.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

from PIL import Image

from pipeline.data.datasets.drawing import draw_fruit
from pipeline.data.datasets.faces import LOOKS, draw_missing
from pipeline.data.datasets.folders import read_folders
from pipeline.data.datasets.person import Color, person
from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.splits import split_of_place
from pipeline.data.datasets.workers import Progress, silent

VERSION = 1  # of the drawing; a change of it is another source
FRUIT = ("apple", "orange")
_APPLES = ((196, 34, 44), (150, 20, 40), (120, 172, 50), (222, 196, 70))
_ORANGES = ((240, 140, 24), (248, 164, 40), (232, 116, 20))


def fruit_label(seed: int, index: int) -> int:
    """0 for an apple, 1 for an orange."""
    return int(Random(f"fruit {seed} {index}").random() < 0.5)


def look_of_fruit(chance: Random) -> SimpleNamespace:
    """Draw how both kinds would look. Every number is drawn, whatever the label is."""

    def near(colors: tuple[Color, ...]) -> Color:
        color = colors[int(chance.random() * len(colors))]
        return tuple(max(0, min(255, round(c + 20 * chance.random() - 10))) for c in color)  # type: ignore[return-value]

    pores = tuple((2 * chance.random() - 1, 2 * chance.random() - 1) for _ in range(60))
    return SimpleNamespace(
        colors=(near(_APPLES), near(_ORANGES)), leaf=chance.random() < 0.5, lean=chance.random() - 0.5, pores=pores
    )


def draw_one(seed: int, index: int, label: int | None = None) -> Image.Image:
    """Draw a fruit, 178x218 RGB. `label` replaces its own and nothing else."""
    return _drawn(seed, index, fruit_label(seed, index) if label is None else label, f"look {seed} {index}")


def _drawn(seed: int, index: int, label: int, look: str) -> Image.Image:
    return draw_fruit(person(Random(f"place {seed} {index}")), look_of_fruit(Random(look)), label)


def fruit_twins(seed: int, key: str) -> Iterator[tuple[str, int, list[Image.Image]]]:
    """Give a fruit as the other kind, in looks that its picture cannot tell."""
    index = int(key[-6:]) - 1
    other = 1 - fruit_label(seed, index)
    yield FRUIT[1], other, [_drawn(seed, index, other, f"twin {seed} {index} {look}") for look in range(LOOKS)]


def _path(seed: int, count: int, index: int) -> str:
    return f"pictures/{split_of_place(index, count)}/{FRUIT[fruit_label(seed, index)]}/{index + 1:06d}.jpg"


def read_fruit(
    source: Path | str, *, count: int, seed: int = 0, workers: int | None = None, skip_bad: bool = False,
    progress: Progress = silent,
) -> Dataset:
    """Draw the fruit that is missing in `source`, and read it as folders are read."""
    source, origin = Path(source), {"drawn": VERSION, "count": count, "seed": seed}
    path_of, picture = partial(_path, seed, count), partial(draw_one, seed)
    draw_missing(source, "fruit", origin, path_of, picture, workers, progress)
    fruit = read_folders(source / "pictures", names=FRUIT, skip_bad=skip_bad, name="fruit")
    return replace(fruit, source={**fruit.source, **origin})
