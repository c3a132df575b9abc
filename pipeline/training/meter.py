"""Read at each log interval what updates reported on average, and how fast the run is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from fader.method import Clock
from pipeline.engine import Engine


@dataclass(frozen=True)
class Progress:
    """What a watcher is told at each log interval. metrics: means over the interval and over ranks."""

    clock: Clock
    total_images: int
    images_per_second: float
    metrics: Mapping[str, float]

    @property
    def seconds_left(self) -> float:
        return max(self.total_images - self.clock.images, 0) / max(self.images_per_second, 1e-9)


class Meter:
    """Measures a run's speed, and reads the sums that its engine keeps of what updates report."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.images_per_second = 0.0
        self.start(0)

    def start(self, images: int) -> None:
        """Begin an interval at so many images seen."""
        self._time, self._images = time.monotonic(), images

    def read(self, images: int) -> tuple[dict[str, float], dict[str, int]]:
        """Return the means over the interval and over ranks, and of how many updates each is; begin the next interval.

        All ranks call it together. It waits for the device.
        """
        metrics, counts = self.engine.read_report()
        self.images_per_second = (images - self._images) / max(time.monotonic() - self._time, 1e-9)
        self.start(images)
        return metrics, counts
