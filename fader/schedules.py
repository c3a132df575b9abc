"""Weights and decays as functions of images seen alone, so that a resumed run reads them off its clock."""

import math
from dataclasses import dataclass
from typing import Literal

Rise = Literal["linear", "cosine", "step", "constant"]


def ramp(value: float, images: int, *, over: int) -> float:
    """A weight that grows linearly from 0 to `value` in `over` images and stays there; `value` at once if over = 0.
    Raises ValueError: a number of images is negative.
    Source: Lample et al. 2017, arXiv:1706.00409, section 4.2: λ from 0 to 1e-4 over 500,000 iterations of 32 images."""
    if over < 0 or images < 0:
        raise ValueError(f"a ramp over {over} images, after {images}: neither can be negative")
    return value if images >= over else value * images / over


@dataclass(frozen=True)
class Schedule:
    """A weight as data: its value at the end, and how it gets there.

    A method names its schedules. Before every update the engine writes the value of each into `Context.weights`.
    to: the weight at the end. over: images over which it rises from 0; 0 = at once. after: images before that, in which it is 0.
    rise: "linear" as in `ramp`; "cosine" (1 - cos π t)/2, slow at both ends; "step" is 0 until the `over` images are through, and
        then the whole weight; "constant" is the whole weight from their beginning.
    """

    to: float
    over: int = 0
    after: int = 0
    rise: Rise = "linear"

    def at(self, images: int) -> float:
        since = images - self.after
        if since < 0 or (self.rise == "step" and since < self.over):
            return 0.0
        if self.rise == "linear":
            return ramp(self.to, since, over=self.over)
        if self.rise == "cosine":
            return self.to * (1 - math.cos(math.pi * ramp(1.0, since, over=self.over))) / 2
        return self.to


def ema_decay(half_life: int, images: int) -> float:
    """What an exponential moving average keeps of itself over `images` images: half after `half_life` of them.
    Raises ValueError: the half-life is not positive."""
    if half_life <= 0:
        raise ValueError(f"half-life is {half_life} images; it must be positive")
    return 0.5 ** (images / half_life)
