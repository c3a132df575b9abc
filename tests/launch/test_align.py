"""The command align as a user calls it, `edit --align auto`, and what they say of photos that show no face."""

from __future__ import annotations

import cmath
import re

import numpy as np
import pytest
from PIL import Image

from fader.similarity import Similarity
from launch import align, edit
from pipeline.data.datasets.faces import draw_face
from pipeline.faces import alignment
from pipeline.faces.alignment import Face
from tests.runs import make_run, painter, photo

ALIGNER = {"name": "aligner", "init_channels": 4, "max_channels": 8, "hidden_channels": 8}


@pytest.fixture
def detector(monkeypatch):
    """Two faces in every photo that is not black: CelebA's frame as it is, and a smaller one."""

    def two(pixels):
        small = Face(Similarity(cmath.rect(0.4, 0.2), 5 + 5j), sure=False)
        return [small, Face(Similarity())] if pixels.max() > 0 else []

    monkeypatch.setattr(alignment, "cascade", two)


def test_a_drawn_face_is_found_in_a_larger_photo_and_stands_upright(tmp_path, call):
    """The cascade itself, which takes most drawn faces for faces: turned, enlarged, turned on its side by EXIF."""
    canvas = Image.new("RGB", (700, 600), (120, 130, 140))
    face = draw_face(0, 0).resize((356, 436), Image.Resampling.LANCZOS)
    canvas.paste(face, (200, 90))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise when shown
    canvas.rotate(90, expand=True).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    code, said, _ = call(align.align, tmp_path / "phone.jpg", tmp_path / "out")
    assert code == 0, said
    eyes = [int(number) for number in re.findall(r"\d+", said[said.index("eyes at") :])[:4]]
    drawn = [200 + 2 * 69, 90 + 2 * 111, 200 + 2 * 108, 90 + 2 * 111]
    assert np.abs(np.subtract(eyes, drawn)).max() < 25
    cut = np.asarray(Image.open(tmp_path / "out" / "phone.png")).astype(float)
    assert cut.shape == (218, 178, 3)
    want = np.asarray(draw_face(0, 0)).astype(float)
    inner = slice(60, 180), slice(40, 140)
    assert np.corrcoef(cut[inner].ravel(), want[inner].ravel())[0, 1] > 0.5
    upside = np.corrcoef(cut[inner].ravel(), want[::-1][inner].ravel())[0, 1]
    assert upside < 0.4
    assert Image.open(tmp_path / "out" / "sheet.png").size == (2 * 178, 218)


def test_photos_and_folders_in_the_largest_face_out_and_the_others_go_on(tmp_path, call, detector):
    photo(tmp_path / "in" / "a.jpg", (300, 260), (90, 60, 30))
    photo(tmp_path / "in" / "black.png", colour=(0, 0, 0))
    (tmp_path / "in" / "broken.jpeg").write_bytes(b"no picture")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    other = photo(tmp_path / "more" / "a.png", colour=(10, 200, 30))
    out = tmp_path / "out"
    code, said, wrong = call(align.align, tmp_path / "in", other, out)
    assert code == 2 and "2 of 4 photos left out" in wrong.splitlines()[-1]
    assert f"left out {tmp_path / 'in' / 'black.png'}: no face found" in wrong
    assert f"left out {tmp_path / 'in' / 'broken.jpeg'}: not a readable picture" in wrong
    assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a.png", "sheet.png"]
    assert "the largest of 2 faces" in said
    assert np.asarray(Image.open(out / "a-2.png"))[0, 0].tolist() == [10, 200, 30]


def test_every_face_and_jpeg_on_wish(tmp_path, call, detector):
    one = photo(tmp_path / "a.jpg", colour=(90, 60, 30))
    code, said, _ = call(align.align, one, tmp_path / "out", "--all", "--format", "jpg")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-face2.jpg", "a.jpg", "sheet.png"]
    assert Image.open(tmp_path / "out" / "a-face2.jpg").format == "JPEG"
    assert "face 2 of 2 by size" in said and "enlarged 2.5 times; hardly seen: look at it" in said


def test_nothing_is_overwritten_unless_told(tmp_path, call, detector):
    one, out = photo(tmp_path / "a.png"), tmp_path / "out"
    assert call(align.align, one, out)[0] == 0
    before = (out / "a.png").read_bytes()
    photo(one, colour=(200, 0, 0))
    code, _, wrong = call(align.align, one, out)
    assert code == 2 and "a.png is there already" in wrong and "--overwrite" in wrong
    assert (out / "a.png").read_bytes() == before
    assert call(align.align, one, out, "--overwrite")[0] == 0
    assert (out / "a.png").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name photos and, last, the folder to write"),
        (["face.png"], "name photos and, last, the folder to write"),
        (["gone.png", "out"], "gone.png: there is no such photo or folder"),
        (["empty", "out"], "empty holds no picture"),
        (["face.png", "face.png"], "face.png is a file; the last word is the folder to write"),
        (["face.png", "out", "--model", "gone"], "gone: there is no such folder"),
        (["face.png", "out", "--model", "painter"], "painter: sham_painter does not align faces"),
        (["face.png", "out", "--format", "gif"], "gif"),
        (["face.png", "--measure", "empty"], "face.png cannot be given too"),
        (["--measure", "empty"], "empty"),
    ],
)
def test_bad_input_gets_a_clear_line_and_leaves_nothing(tmp_path, monkeypatch, call, detector, words, says):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "face.png")
    (tmp_path / "empty").mkdir()
    with painter() as method:
        make_run(tmp_path / "painter", method)
        code, _, wrong = call(align.align, *words)
    assert code == 2 and says in wrong, wrong
    assert not (tmp_path / "out").exists()


def test_it_measures_the_cascade_and_an_aligner(tmp_path, faces, call):
    run = make_run(tmp_path / "aligner", ALIGNER)
    code, said, _ = call(align.align, "--measure", faces, "--split", "train", "--count", "3", "--model", run)
    assert code == 0, said
    lines = said.splitlines()
    assert "3 of the" in lines[0] and "turned by up to 30 degrees" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == ["cascade alone", "refined by the aligner"]
    assert lines[1].split("  ")[-1].strip() == "90th percentile px" and "within 9.8 px" in lines[1]


def test_edit_cuts_photos_to_the_face_and_names_one_that_shows_none(tmp_path, call, detector):
    """The painter reads Smiling from red: only in the found face is the photo red."""
    pixels = np.zeros((400, 500, 3), np.uint8)
    pixels[..., 1] = 255
    pixels[:218, :178] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "group.png")
    black = photo(tmp_path / "black.png", colour=(0, 0, 0))
    with painter() as method:
        make_run(tmp_path / "judge", method)
        run = make_run(tmp_path / "painter", method, judge=str(tmp_path / "judge"))
        words = ["--model", run, "--set", "Eyeglasses=1", "--out", tmp_path / "out"]
        code, said, _ = call(edit.app, tmp_path / "group.png", *words, "--align", "auto")
        assert code == 0 and "group.png shows 2 faces; the largest is taken" in said
        assert "Smiling=1 Eyeglasses=0" in said and "centred square" not in said
        assert said.splitlines()[-1].endswith("--align auto")
        _, plain, _ = call(edit.app, tmp_path / "group.png", *words)
        assert "Smiling=0 Eyeglasses=1" in plain and "centred square" in plain
        code, _, wrong = call(edit.app, tmp_path / "group.png", black, *words, "--align", "auto")
        assert code == 1 and f"left out: {black}: no face found" in wrong and "1 of 2 photos were left out" in wrong
        code, _, wrong = call(edit.app, black, *words, "--aligner", run)
        assert code == 2 and "--aligner" in wrong and "is for --align auto" in wrong
        code, _, wrong = call(edit.app, black, *words, "--align", "auto", "--aligner", run)
        assert code == 2 and "does not align faces" in wrong
