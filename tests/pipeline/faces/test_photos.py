"""Photos: a square says where it lies in its photo, and an edited face goes back there and nowhere else."""

from __future__ import annotations

import cmath
import dataclasses

import numpy as np
import pytest
from PIL import Image

from fader.similarity import Similarity
from pipeline.faces import photos
from pipeline.faces.alignment import Face
from pipeline.images import Preprocessing
from tests.pipeline.faces.test_alignment import spots

FACES = {
    "no face found": None,
    "as it is": Face(Similarity(1, 60 + 30j)),
    "turned": Face(Similarity(cmath.rect(1, 0.4), 120 + 40j)),
    "large": Face(Similarity(cmath.rect(1.6, -0.2), 40 + 90j)),
    "small": Face(Similarity(cmath.rect(0.4, 0.1), 60 + 30j)),
}
RULES = {
    "celeba": Preprocessing(128, "celeba"),
    "center": Preprocessing(64, "center"),
    "letterbox": Preprocessing(96, "letterbox"),
    "grown": Preprocessing(512, "center"),
}


def waves(width: int = 420, height: int = 460) -> Image.Image:
    """A photo of slow waves, the same at every scale that a crop keeps."""
    x, y = np.meshgrid(np.arange(width) / 25, np.arange(height) / 25)
    pixels = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)
    return Image.fromarray((127 + 100 * pixels).round().astype(np.uint8))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("rule", RULES)
def test_a_square_pasted_back_unedited_leaves_the_photo_as_it_was(rule, face):
    """Half a pixel wrong anywhere between photo, crop, square and paste would show."""
    photo = waves()
    cut = photos.portrait("a", photo, RULES[rule], FACES[face])
    off = np.asarray(photos.paste(cut, cut.pixels)).astype(int) - np.asarray(photo)
    assert np.abs(off).max() < 20 and np.abs(off).mean() < 1.6  # a letterbox rounds its shorter side to whole pixels

    wrong = dataclasses.replace(cut, frame=Similarity(1, 2 + 0j) @ cut.frame)
    assert np.abs(np.asarray(photos.paste(wrong, cut.pixels)).astype(int) - np.asarray(photo)).mean() > 1.5 * np.abs(off).mean()


@pytest.mark.parametrize("face", ["turned", "small"])
def test_an_edited_face_shows_where_the_face_was_and_fades_into_the_photo(face):
    photo = Image.new("RGB", (420, 460), (0, 0, 0))
    cut = photos.portrait("a", photo, RULES["celeba"], FACES[face])
    pasted = np.asarray(photos.paste(cut, np.full((128, 128, 3), 200, np.uint8)))[..., 0]
    grid = np.arange(420)[None, :] + 1j * np.arange(460)[:, None]
    inside = cut.frame.inverse()(grid)
    edge = np.minimum.reduce([inside.real, inside.imag, 127 - inside.real, 127 - inside.imag])
    assert not pasted[edge < -0.5].any() and (pasted[edge > 128 * photos.SOFT_EDGE + 2] == 200).all()
    fading = pasted[(edge > 4) & (edge < 15)]
    assert 0 < fading.min() and fading.max() < 200
    assert np.asarray(photo).max() == 0, "the photo itself was painted on"


def test_a_face_at_the_photos_edge_is_pasted_as_far_as_the_photo_goes():
    photo = Image.new("RGB", (200, 150), (0, 0, 0))
    cut = photos.portrait("a", photo, RULES["celeba"], Face(Similarity(1, -80 - 60j)))
    pasted = np.asarray(photos.paste(cut, np.full((128, 128, 3), 200, np.uint8)))
    assert pasted.shape == (150, 200, 3) and (pasted[:60, :50] == 200).all() and not pasted[:, 120:].any()


def test_spots_of_a_photo_are_where_the_frame_says():
    frame = Similarity(cmath.rect(1.5, 0.3), 70 + 40j)
    pixels = np.full((460, 420, 3), 100, np.uint8)
    for channel, at in ((0, frame(60 + 90j)), (2, frame(110 + 100j))):
        grid = np.arange(420)[None, :] + 1j * np.arange(460)[:, None]
        pixels[..., channel][np.abs(grid - at) < 9] = 255
    cut = photos.portrait("a", Image.fromarray(pixels), RULES["celeba"], Face(frame))
    for spot, at in zip(spots(cut.pixels), (frame(60 + 90j), frame(110 + 100j))):
        assert abs(cut.frame(spot) - at) < 0.5


def test_the_second_picture_of_a_stem_gets_a_number():
    taken: list[str] = []
    for stem in ("a", "b", "a", "a"):
        taken.append(photos.free_stem(stem, taken.__contains__))
    assert taken == ["a", "b", "a-2", "a-3"]
