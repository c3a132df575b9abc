"""Weights and decays as functions of images seen, and of nothing else: a resumed run reads them off its clock."""

from __future__ import annotations


def ramp(value: float, images: int, *, over: int) -> float:
    """A weight that grows linearly from 0 to `value` in `over` images and stays there; `value` at once if over = 0.

    Source: Lample et al. 2017, arXiv:1706.00409, section 4.2: λ from 0 to 1e-4 over 500,000 iterations of 32 images.

    Raises:
        ValueError: a number of images is negative.
    """
    if over < 0 or images < 0:
        raise ValueError(f"a ramp over {over} images, after {images}: neither can be negative")
    return value if images >= over else value * images / over


def ema_decay(half_life: int, images: int) -> float:
    """What an exponential moving average keeps of itself over `images` images: half after `half_life` of them.

    Raises:
        ValueError: the half-life is not positive.
    """
    if half_life <= 0:
        raise ValueError(f"half-life is {half_life} images; it must be positive")
    return 0.5 ** (images / half_life)
