"""Alignment: crops stand where CelebA's do, however the photo is turned; errors are measured as planted."""

from __future__ import annotations

import cmath
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.method import METHODS
from fader.similarity import Similarity
from pipeline.data.datasets.faces import draw_face
from pipeline.faces import alignment, misalignment
from pipeline.faces.alignment import EYES, Face, crop, find, refine
from pipeline.images import Preprocessing
from pipeline.models import Model

ONE = Attributes([Attribute("a")])
RED, BLUE = 0, 2


def face_of_spots(frame: Similarity, size: tuple[int, int], radius: float = 6.0) -> np.ndarray:
    """A grey picture with a red spot at the left eye and a blue one at the right, `radius` in pixels of the crop."""
    width, height = size
    points = np.arange(width)[None, :] + 1j * np.arange(height)[:, None]
    picture = np.full((height, width, 3), 100.0)
    for channel, eye in zip((RED, BLUE), EYES):
        bump = 155 * np.exp(-((np.abs(points - frame(eye)) / (radius * abs(frame.factor))) ** 2))
        picture[..., channel] += bump
    return picture.round().astype(np.uint8)


def spots(picture: np.ndarray) -> tuple[complex, complex]:
    """Where the red and the blue spot stand."""
    points = np.arange(picture.shape[1])[None, :] + 1j * np.arange(picture.shape[0])[:, None]
    weights = [np.clip(picture[..., channel].astype(float) - 150, 0, None) for channel in (RED, BLUE)]
    left, right = (complex((points * weight).sum() / weight.sum()) for weight in weights)
    return left, right


def off(found: Face, truth: Similarity) -> float:
    """Largest eye error in pixels of the crop."""
    return max(abs(eye - truth(want)) for eye, want in zip(found.eyes, EYES)) / abs(truth.factor)


def detect_spots(photo: np.ndarray) -> list[Face]:
    return [Face(Similarity.between(EYES, spots(photo)))]


FRAMES = {
    "as it is": Similarity(1 + 0j, 30 + 12j),
    "shrunk": Similarity(cmath.rect(4.7, 0.4), 300 + 60j),
    "grown": Similarity(cmath.rect(0.45, -0.5), 40 + 90j),
    "upside down": Similarity(cmath.rect(1.3, math.pi), 350 + 400j),
}


@pytest.mark.parametrize("name", FRAMES)
def test_eyes_come_to_stand_where_celeba_has_them(name):
    frame = FRAMES[name]
    size = (1100, 1400) if name == "shrunk" else (420, 480)
    cut = crop(face_of_spots(frame, size), frame)
    assert cut.shape == (218, 178, 3) and cut.dtype == np.uint8
    for found, eye in zip(spots(cut), EYES):
        assert found == pytest.approx(eye, abs=0.1)


def test_a_shrunk_crop_averages_what_a_plain_warp_would_skip():
    checks = np.indices((1600, 1400)).sum(0) % 2 * 255
    photo = np.repeat(checks[..., None], 3, 2).astype(np.uint8)
    frame = Similarity(cmath.rect(6.3, 0.2), 250 + 20j)
    assert crop(photo, frame).std() < 6
    assert alignment._warp(photo, frame, (178, 218)).std() > 40, "the fault would go unseen"


def test_beyond_the_photo_its_mirror_image_is_seen():
    photo = np.full((218, 178, 3), 200, np.uint8)
    assert (crop(photo, Similarity(1 + 0j, -60 - 60j)) == 200).all()


class Oracle:
    """An aligner that reads the spots in its window, and remembers how many windows it saw."""

    name, channels, image_size, attributes = "oracle", 3, 128, ONE
    window_size, window = 64, Similarity(0.75 + 0j, 0.1j)

    def __init__(self) -> None:
        self.rounds = 0

    def align(self, windows: torch.Tensor) -> Similarity:
        self.rounds += 1
        pixels = ((windows + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        square = Similarity(89 + 0j, 88.5 + 108.5j)  # of the crop "celeba": columns 0 to 178, rows 20 to 198
        here = [(self.window.inverse() @ square.inverse())(eye) for eye in EYES]
        to_window = Similarity(complex(2 / 64), complex(1 / 64 - 1, 1 / 64 - 1))
        seen = [Similarity.between(tuple(here), tuple(map(to_window, spots(one)))) for one in pixels]
        return Similarity(torch.tensor([s.factor for s in seen]), torch.tensor([s.shift for s in seen]))


def model(method: object, crop_rule: str = "celeba") -> Model:
    return Model(method, {}, ONE, Preprocessing(128, crop_rule, method.channels), (), "runs/oracle")


@pytest.mark.parametrize("rule", ["celeba", "center"])
def test_an_aligner_that_is_right_leaves_no_error(rule):
    """Half a pixel wrong anywhere between window, square, crop and photo would show."""
    truth = Similarity(cmath.rect(1.7, 0.3), 120 + 40j)
    photo = face_of_spots(truth, (600, 640), radius=4.0)
    rough = Face(truth @ Similarity(cmath.rect(1.15, -0.2), 9 + 12j))
    oracle = Oracle()
    assert off(rough, truth) > 4
    (found,) = refine(photo, [rough], model(oracle, rule))
    assert off(found, truth) < 0.15 and oracle.rounds == alignment.ROUNDS
    (found,) = find(photo, model(oracle, rule), lambda _: [rough])
    assert off(found, truth) < 0.15


def test_faces_come_largest_first():
    faces = [Face(Similarity(complex(scale), 0j)) for scale in (1, 3, 2)]
    assert [face.size for face in find(np.zeros((9, 9, 3), np.uint8), detector=lambda _: faces)] == [3, 2, 1]


def test_what_cannot_align_is_refused():
    judge = METHODS["judge"](METHODS["judge"].Settings(init_channels=2, max_channels=2, hidden_channels=2), ONE, 16)
    photo, face = np.zeros((218, 178, 3), np.uint8), Face(Similarity())
    with pytest.raises(ValueError, match="runs/oracle: judge does not align faces; give a model of the method aligner"):
        refine(photo, [face], model(judge))
    grey = Oracle()
    grey.channels = 1
    with pytest.raises(ValueError, match="reads grey pictures"):
        refine(photo, [face], model(grey))
    with pytest.raises(ValueError, match="up to 32,000 pixels"):
        find(np.zeros((1, 40_000, 3), np.uint8))


def test_opencv_that_is_absent_or_has_no_cascades_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install 'attribute-sliders\[align\]'"):
        alignment.opencv()
    monkeypatch.setitem(sys.modules, "cv2", type("cv2", (), {"__version__": "5.0.0"}))
    with pytest.raises(ValueError, match="5.0.0 has no cascades"):
        alignment.opencv()


# --- the cascade ------------------------------------------------------------------------------------------------------


def boxes(*rows: tuple[complex, float, float, int]) -> list[alignment._Box]:
    return [alignment._Box(*row) for row in rows]


@pytest.mark.parametrize("turn", [-25.0, 0.0, 40.0])
def test_a_mean_of_boxes_turns_their_eyes_about_their_centre(turn):
    mean = alignment._mean(boxes((100 + 80j, 50.0, turn - 15, 10), (100 + 80j, 50.0, turn + 15, 10)))
    left, right = mean(EYES[0]), mean(EYES[1])
    assert math.degrees(cmath.phase(right - left)) == pytest.approx(turn)
    assert abs(right - left) == pytest.approx(0.381 * 50)
    up = ((left + right) / 2 - (100 + 80j)) * cmath.exp(-1j * math.radians(turn))
    assert up == pytest.approx(complex(-0.0015, -0.123) * 50, abs=1e-6)


def test_boxes_of_one_face_are_one_and_those_around_or_inside_it_go(monkeypatch):
    seen = {
        0: boxes((100 + 100j, 50.0, 0, 30), (300 + 100j, 40.0, 0, 12), (105 + 98j, 150.0, 0, 4)),
        15: boxes((102 + 101j, 54.0, 15, 20), (110 + 95j, 18.0, 15, 3)),
    }
    monkeypatch.setattr(alignment, "_boxes", lambda grey, turn, step: seen.get(turn, []))
    groups = alignment._groups(np.zeros((200, 400), np.uint8), 1.15)
    assert [sorted(box.side for box in group) for group in groups] == [[50.0, 54.0], [40.0]]


@pytest.fixture
def looks(monkeypatch):
    """A sham cascade: a face of 4 votes a turn at the first look, 3 at the fine one, 20 at 1,200 pixels."""
    seen = []

    def sham(grey, turn, step):
        seen.append((max(grey.shape), step))
        votes = 20 if max(grey.shape) == 1200 else {1.15: 4, 1.06: 3}[step]
        return boxes((20 + 20j, 10.0, turn, votes)) if turn in (0, 15, -15) else []

    monkeypatch.setattr(alignment, "_boxes", sham)
    return seen


def test_few_votes_ask_for_a_second_look_and_count_as_unsure(monkeypatch, looks):
    (face,) = alignment.cascade(np.zeros((500, 60, 3), np.uint8))
    assert not face.sure and set(looks) == {(400, 1.15), (400, 1.06)}
    monkeypatch.setattr(alignment, "_FEW_VOTES", 10)
    assert not alignment.cascade(np.zeros((60, 60, 3), np.uint8))


def test_a_large_photo_is_searched_for_small_faces_before_it_is_given_up(looks):
    (face,) = alignment.cascade(np.zeros((60, 3600, 3), np.uint8))
    assert face.sure and set(looks) == {(400, 1.15), (1200, 1.15)}
    across = 0.381 * 10 * 3600 / 1200  # of a box of 10 pixels at a third of the photo's size
    assert abs(face.eyes[1] - face.eyes[0]) == pytest.approx(across)
    assert sum(face.eyes) / 2 == pytest.approx(20 * 3 + 1 + (20 * 3 + 1) * 1j, abs=5)


def test_upright_faces_are_found_by_one_look(monkeypatch, looks):
    (face,) = alignment.upright(np.zeros((500, 60, 3), np.uint8))
    assert face.sure and looks == [(240, 1.15)], "one turn"
    monkeypatch.setattr(alignment, "_UPRIGHT_VOTES", 5)
    assert not alignment.upright(np.zeros((500, 60, 3), np.uint8))


def test_a_face_that_moves_is_followed_and_one_that_is_gone_is_not():
    """Searched around where it was, it is found where a search of the whole picture finds it."""
    face = draw_face(0, 5).resize((150, 184), Image.Resampling.LANCZOS)
    last = None
    for step in range(4):
        photo = Image.new("RGB", (320, 240), (120, 130, 140))
        photo.paste(face, (80 + 8 * step, 30 + 4 * step))
        (last,) = alignment.follow(np.asarray(photo), last)
        (wanted,) = alignment.upright(np.asarray(photo))
        assert abs(last.eyes[0] - wanted.eyes[0]) < 5 and abs(last.size / wanted.size - 1) < 0.1
    assert alignment.follow(np.full((240, 320, 3), 120, np.uint8), last) == []
    elsewhere = Face(Similarity(1, -900 - 900j))
    assert len(alignment.follow(np.asarray(photo), elsewhere)) == 1, "the whole picture is searched again"


@pytest.mark.parametrize("turn", [-30, 0, 20])
def test_a_turned_picture_gives_its_boxes_in_the_photos_pixels(monkeypatch, turn):
    """A sham cascade that sees a bright square: its box comes back where it was drawn."""
    at = 130 + 70j
    line = np.arange(200)
    grey = np.where(np.abs(line[None, :] + 1j * line[:160, None] - at) < 12, 255, 20).astype(np.uint8)

    class Sham:
        def detectMultiScale2(self, picture, **_):
            rows, columns = np.nonzero(picture > 140)
            left, top = columns.mean() - 19.5, rows.mean() - 19.5
            return np.array([[left, top, 40, 40]]), np.array([9])

    monkeypatch.setattr(alignment, "_classifier", Sham)
    (box,) = alignment._boxes(grey, turn, 1.15)
    assert box.center == pytest.approx(at, abs=0.3) and (box.side, box.turn, box.votes) == (40.0, turn, 9)


def test_an_empty_photo_shows_no_face():
    assert alignment.cascade(np.full((300, 260, 3), 127, np.uint8)) == []


# --- measuring --------------------------------------------------------------------------------------------------------


class Pictures:
    """What `measure` needs of a split: pictures with spots for eyes."""

    keys = [f"{k:06}" for k in range(6)]

    def __init__(self, size: tuple[int, int] = (178, 218)) -> None:
        self.size = size

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, row: int) -> Image.Image:
        return Image.fromarray(face_of_spots(Similarity(), self.size))


def test_planted_faces_lie_where_it_is_said_turned_and_scaled_in_every_way():
    turns, zooms = [], []
    for row in range(30):
        draws = Draws.of(0, "misalignment", 0, torch.tensor([row]))
        canvas, place = misalignment.plant(face_of_spots(Similarity(), (178, 218)), draws)
        assert canvas.shape == (480, 480, 3)
        assert off(detect_spots(canvas)[0], place) < 0.3
        corners = [place(complex(x, y)) for x in (0, 177) for y in (0, 217)]
        assert all(-0.5 <= part <= 479.5 for c in corners for part in (c.real, c.imag))
        turns.append(math.degrees(cmath.phase(place.factor)))
        zooms.append(abs(place.factor))
    assert -30 <= min(turns) < -20 and 20 < max(turns) <= 30
    assert 0.6 <= min(zooms) < 0.75 and 1.3 < max(zooms) <= 1.6


def test_errors_are_those_that_were_planted():
    """A detector that is 6 pixels off in the crop's measure, and one that finds nothing in every second picture."""
    calls = []

    def shifted(photo):
        (face,) = detect_spots(photo)
        calls.append(face)
        return [Face(face.frame @ Similarity(1 + 0j, 6 + 0j))] if len(calls) % 2 else []

    alone, refined = misalignment.measure(Pictures(), 6, model(Oracle()), detector=shifted)
    assert alone.found == alone.right == refined.found == 0.5
    assert alone.percentile(50) == pytest.approx(6, abs=0.2) and refined.percentile(90) < 0.3
    (far,) = misalignment.measure(Pictures(), 6, detector=lambda _: [Face(Similarity())])
    assert far.found == 1 and far.right == 0
    (none,) = misalignment.measure(Pictures(), 4, detector=lambda _: [])
    assert none.found == none.right == 0 and math.isnan(none.percentile(50)) and len(none.pixels) == 4


def test_records_that_are_not_aligned_are_not_measured():
    with pytest.raises(ValueError, match="000000 is 64x64; aligned pictures are 178x218"):
        misalignment.measure(Pictures((64, 64)), 2)
