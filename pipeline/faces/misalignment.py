"""Measure how well faces are aligned: plant aligned pictures in a larger canvas, turned and scaled, and find them again."""

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fader.draws import Draws
from fader.similarity import Similarity
from pipeline.data.shards import Split
from pipeline.faces.alignment import EYES, Detector, Face, cascade, crop, find, refine
from pipeline.images import CELEBA_SIZE
from pipeline.models import Model

CANVAS = 480
MAX_TURN = 30.0
ZOOMS = (0.6, 1.6)
RIGHT_WITHIN = 0.25 * abs(EYES[1] - EYES[0])
"""An eye error up to which a face counts as right: a quarter of the eyes' distance, as usual for eye detectors."""
_BLUR = 6  # the canvas is filled with the picture shrunk to so many pixels a side


@dataclass(frozen=True)
class Errors:
    """The errors of one way to find faces. pixels: [N] `eye_error` of each picture; inf where no face was found."""

    name: str
    pixels: np.ndarray

    @property
    def found(self) -> float:
        return float(np.isfinite(self.pixels).mean())

    @property
    def right(self) -> float:
        """The share of pictures with an error of at most RIGHT_WITHIN."""
        return float((self.pixels <= RIGHT_WITHIN).mean())

    def percentile(self, share: float) -> float:
        """Return a percentile of the error over the pictures in which a face was found; nan where there is none."""
        known = self.pixels[np.isfinite(self.pixels)]
        return float(np.percentile(known, share)) if len(known) else math.nan


def plant(picture: np.ndarray, draws: Draws) -> tuple[np.ndarray, Similarity]:
    """Plant an aligned picture in a larger canvas; return both the canvas and the similarity from picture to canvas.
    The picture is turned by up to MAX_TURN degrees and scaled within ZOOMS, and lies wholly in the canvas. Around it the canvas
    shows the picture's own colours, blurred beyond recognition.
    picture: uint8 [218, 178, 3]. draws: of one record; the same draws give the same canvas."""
    height, width = picture.shape[:2]
    turn, zoom, across, down = draws.uniform("canvas", (4,))[0].tolist()
    smallest, largest = map(math.log, ZOOMS)
    factor = cmath.rect(math.exp(smallest + zoom * (largest - smallest)), math.radians((2 * turn - 1) * MAX_TURN))
    corners = [factor * complex(x, y) for x in (0, width - 1) for y in (0, height - 1)]
    free = [(-min(side), CANVAS - 1 - max(side)) for side in ([c.real for c in corners], [c.imag for c in corners])]
    place = Similarity(factor, complex(*(a + share * (b - a) for share, (a, b) in zip((across, down), free))))
    around = Image.fromarray(picture).resize((_BLUR, _BLUR), Image.Resampling.BOX).resize((CANVAS,) * 2)
    line = np.arange(CANVAS)
    there = place.inverse()(line[None, :] + 1j * line[:, None])
    inside = (there.real >= 0) & (there.real <= width - 1) & (there.imag >= 0) & (there.imag <= height - 1)
    seen = crop(picture, place.inverse(), (CANVAS, CANVAS))
    return np.where(inside[..., None], seen, np.asarray(around)), place


def eye_error(faces: Sequence[Face], place: Similarity) -> float:
    """Return the mean distance of the first face's eyes from CelebA's, in the planted picture's pixels; inf without a face."""
    if not faces:
        return math.inf
    back = place.inverse()
    return sum(abs(back(eye) - planted) for eye, planted in zip(faces[0].eyes, EYES)) / len(EYES)


def measure(
    split: Split, count: int, aligner: Model | None = None, *, seed: int = 0, detector: Detector = cascade,
    watch: Callable[[int], None] = lambda done: None,
) -> list[Errors]:
    """Measure the detector alone, and refined where there is an aligner, on `count` records spread evenly over a split.
    Raises ValueError: a record is not 178x218, and so not aligned as CelebA's are."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)).tolist()
    alone, refined = [], []
    for done, row in enumerate(rows):
        picture = split.picture(row)
        if picture.size != CELEBA_SIZE:
            raise ValueError(f"{split.keys[row]} is {picture.width}x{picture.height}; aligned pictures are 178x218")
        canvas, place = plant(np.asarray(picture), Draws.of(seed, "misalignment", 0, torch.tensor([row])))
        faces = find(canvas, detector=detector)[:1]
        alone.append(eye_error(faces, place))
        if aligner is not None:
            refined.append(eye_error(refine(canvas, faces, aligner) if faces else [], place))
        watch(done + 1)
    errors = [Errors("cascade alone", np.array(alone))]
    return [*errors, Errors("refined by the aligner", np.array(refined))] if aligner is not None else errors
