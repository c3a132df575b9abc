"""The commands register, edit and sync as a user calls them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fader.similarity import Similarity
from launch import edit, register, sample, sync
from pipeline import models
from pipeline.faces import photos
from pipeline.faces.alignment import Face
from tests.runs import FADER, JUDGE, make_run, make_store, painter, photo
from tests.shams import Drawing, registered
from tests.warm import forked


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A painter judged by itself, and one that has no judge."""
    folder = tmp_path_factory.mktemp("runs")
    with painter() as method:
        make_run(folder / "judge", method)
        make_run(folder / "painter", method, judge=str(folder / "judge"))
        make_run(folder / "alone", method)
        yield folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


RED, BLACK = (255, 0, 0), (0, 0, 0)  # a painter's Smiling, and nothing


def test_the_whole_way_from_a_run_to_an_edited_photo(tmp_path):
    """Real processes, real networks, the command lines of the README."""
    make_run(tmp_path / "judge", JUDGE)
    make_run(tmp_path / "run", FADER, judge=str(tmp_path / "judge"))
    photo(tmp_path / "a.jpg")
    here = {"cwd": tmp_path, "MLFLOW_TRACKING_URI": make_store(tmp_path)}
    done = forked("launch.register", "run", "--name", "faces", **here)
    assert "registered faces version 1 as models:/faces@challenger" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    words = ["a.jpg", "--model", "models:/faces@challenger", "--set", "Smiling=1.5", "Eyeglasses=-1", "--out", "out"]
    done = forked("launch.edit", *words, **here)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "grid.png"]
    assert "read by the model's judge: Smiling, Eyeglasses, Beard" in done.stdout
    assert picture(tmp_path / "out" / "a.png").shape == (32, 32, 3)


def test_several_values_may_follow_one_option_or_each_its_own(runs, tmp_path, call):
    face = photo(tmp_path / "face.png", colour=BLACK)
    words = [face, "--model", runs / "painter"]
    code, said, _ = call(edit.app, *words, "--set", "Smiling=1", "Eyeglasses=1", "--out", tmp_path / "one")
    assert code == 0, said
    code, _, _ = call(edit.app, *words, "--set", "Smiling=1", "--set", "Eyeglasses=1", "--out", tmp_path / "two")
    assert code == 0
    code, _, _ = call(edit.app, "--out", tmp_path / "three", "--set", "Smiling=1", "Eyeglasses=1", *words)
    assert code == 0, "photos after the values"
    for folder in ("one", "two", "three"):
        assert picture(tmp_path / folder / "face.png")[0, 0].tolist() == [255, 255, 0]


def test_a_sweep_is_a_row_a_photo_original_reconstruction_steps(runs, tmp_path, call):
    faces = [photo(tmp_path / "a.png", colour=BLACK), photo(tmp_path / "b.png", colour=RED)]
    words = ["--model", runs / "painter", "--sweep", "Smiling=-1:1:5", "--out", tmp_path / "out"]
    code, _, _ = call(edit.app, *faces, *words)
    assert code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-Smiling.png", "b-Smiling.png", "sweep-Smiling.png"]
    grid = picture(tmp_path / "out" / "sweep-Smiling.png")
    centres = grid[18::34, 18::34, 0]
    assert centres.shape == (2, 7)
    assert centres[:, :2].tolist() == [[0, 0], [255, 255]], "original, reconstruction"
    assert centres[:, 2:].tolist() == [[0, 64, 128, 191, 255]] * 2
    assert (picture(tmp_path / "out" / "b-Smiling.png")[18, 18::34, 0] == centres[1]).all()


def test_one_of_many_values_is_set_either_way(runs, tmp_path, call):
    face = photo(tmp_path / "face.png", colour=BLACK)
    for i, words in enumerate(["Beard=full", "Beard.full=1"]):
        code, _, _ = call(edit.app, face, "--model", runs / "painter", "--set", words, "--out", tmp_path / str(i))
        assert code == 0 and picture(tmp_path / str(i) / "face.png")[0, 0].tolist() == [0, 0, 255]


def test_it_says_whose_word_the_own_attributes_are(runs, tmp_path, call):
    face = photo(tmp_path / "face.png", colour=RED)
    words = ["--set", "Smiling=-1", "--out", tmp_path / "out"]
    _, said, _ = call(edit.app, face, "--model", runs / "painter", *words)
    assert "read by the model's judge: Smiling, Eyeglasses, Beard" in said
    assert f"{face}: Smiling=1 Eyeglasses=0 Beard=none" in said
    _, said, _ = call(edit.app, face, "--model", runs / "alone", *words, "--attributes", "Smiling=0", "Beard=full")
    assert "as given: Smiling, Beard" in said and "best reconstruction" in said
    assert f"{face}: Smiling=0 Eyeglasses=0 Beard=full" in said


def test_a_photo_of_another_size_is_cut_to_its_middle_with_a_note(runs, tmp_path, call):
    face = photo(tmp_path / "wide.png", (400, 300), RED)
    code, said, _ = call(edit.app, face, "--model", runs / "painter", "--set", "Smiling=0", "--out", tmp_path / "out")
    assert code == 0 and "wide.png is 400x300" in said and "centred square" in said


def test_photos_of_one_name_do_not_overwrite_each_other(runs, tmp_path, call):
    faces = [photo(tmp_path / place / "grid.png", colour=colour) for place, colour in (("x", BLACK), ("y", RED))]
    code, _, _ = call(edit.app, *faces, "--model", runs / "painter", "--set", "Eyeglasses=1", "--out", tmp_path / "out")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid-2.png", "grid-3.png", "grid.png"]
    assert picture(tmp_path / "out" / "grid-2.png")[0, 0].tolist() == [0, 255, 0]
    assert picture(tmp_path / "out" / "grid-3.png")[0, 0].tolist() == [255, 255, 0]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["text.jpg", "--set", "Smiling=1"], "text.jpg: not a readable picture"),
        (["gone.jpg", "--set", "Smiling=1"], "gone.jpg: there is no such photo or folder"),
        (["empty", "--set", "Smiling=1"], "empty holds no picture"),
        (["face.jpg"], "nothing to do: give --set"),
        (["face.jpg", "--set", "Smilling=1"], "unknown attribute 'Smilling'; did you mean 'Smiling'?"),
        (["face.jpg", "--set", "Smiling"], "--set Smiling: write NAME=VALUE"),
        (["face.jpg", "--set", "Smiling=much"], "Smiling=much: not a number"),
        (["face.jpg", "--set", "Beard=2"], "Beard is one of none, moustache, full"),
        (["face.jpg", "--sweep", "Smiling=-1:1"], "write NAME=FROM:TO:STEPS"),
        (["face.jpg", "--sweep", "Smiling=-1:1:1"], "2 to 101 steps"),
        (["face.jpg", "--grid", "Smiling=-1:1:2"], "--grid takes two sliders"),
        (["face.jpg", "--grid", "Beard.full=-1:1:2", "Beard.none=-1:1:2"], "take two attributes"),
        (["face.jpg", "--set", "Smiling=1", "--animate"], "give --sweep too"),
        (["face.jpg", "--set", "Smiling=1", "--face", "2"], "--face 2 is for --align auto"),
        (["face.jpg", "--set", "Smiling=1", "--attributes", "Smiling=-1"], "Smiling is 0 or 1"),
        (["face.jpg", "--set", "Smiling=1", "--model", "gone"], "gone: there is no such folder"),
        (["face.jpg", "--set", "Smiling=1", "--model", "models:/x"], "write models:/NAME@ALIAS"),
        (["face.jpg", "--set", "Smiling=1", "--out", "face.jpg"], "--out face.jpg: face.jpg is a file"),
        (["face.jpg", "--set", "Smiling=1", "--out", "face.jpg/a/b"], "face.jpg is a file; name a folder"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(runs, tmp_path, monkeypatch, call, words, match):
    monkeypatch.chdir(tmp_path)
    photo(Path("face.jpg"))
    Path("text.jpg").write_text("not a picture")
    Path("empty").mkdir()
    words = [*words, *([] if "--model" in words else ["--model", runs / "painter"])]
    words += [] if "--out" in words else ["--out", "out"]
    code, _, said = call(edit.app, *words)
    assert code == 2 and match in said, said
    assert len(said.strip().splitlines()) == 1 and said.startswith("error: ")
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "face.jpg", "text.jpg"]


def test_a_judge_has_no_sliders(tmp_path, call):
    judge = make_run(tmp_path / "judge", JUDGE)
    words = [photo(tmp_path / "a.png"), "--model", judge, "--set", "Smiling=1", "--out", tmp_path / "out"]
    code, _, said = call(edit.app, *words)
    assert code == 2 and "it has no sliders to move" in said and not (tmp_path / "out").exists()


def test_the_edited_face_is_pasted_into_its_photo_on_wish(runs, tmp_path, call):
    """The crop rule 'celeba' takes the photo's rows 20 to 198: the edit shows there, and fades at the edge."""
    face, words = photo(tmp_path / "face.png", colour=BLACK), ["--model", runs / "painter", "--set", "Smiling=1"]
    code, said, _ = call(edit.app, face, *words, "--out", tmp_path / "out", "--paste")
    assert code == 0 and "face-pasted.png" in said
    pasted = picture(tmp_path / "out" / "face-pasted.png")
    assert pasted.shape == (218, 178, 3) and pasted[109, 89].tolist() == [255, 0, 0]
    assert not pasted[:20].any() and not pasted[199:].any() and (np.diff(pasted[20:60, 89, 0].astype(int)) >= 0).all()
    code, _, said = call(edit.app, face, *words[:2], "--sweep", "Smiling=0:1:2", "--out", tmp_path / "two", "--paste")
    assert code == 2 and "give --set too" in said


def test_a_folder_is_edited_some_photos_at_a_time_and_a_bad_one_is_left_out(runs, tmp_path, call, monkeypatch):
    monkeypatch.setattr(edit, "_TOGETHER", 2)
    for i in range(5):
        photo(tmp_path / "in" / f"{i}.png", colour=RED if i % 2 else BLACK)
    (tmp_path / "in" / "3x.jpg").write_text("no picture")
    words = ["--model", runs / "painter", "--set", "Eyeglasses=1", "--swap", "all", "--out", tmp_path / "out"]
    code, said, errors = call(edit.app, tmp_path / "in", *words)
    assert code == 1 and "left out: " in errors and "3x.jpg" in errors and "1 of 6 photos were left out" in errors
    assert re.search(r"(1|2|4|8|16) at a time are the fastest here", said)
    assert said.count("read by the model's judge") == 1 and "4.png: Smiling=0" in said
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*(f"{i}{part}.png" for i in range(5) for part in ("", "-swaps")), "grid.png", "swaps.png"])
    centres = picture(tmp_path / "out" / "swaps.png")[18::34, 18::34]
    assert centres.shape == (5, 5, 3), "five photos; original, reconstruction, a column an attribute"
    assert centres[1].tolist() == [[255, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 0], [255, 255, 0]]
    assert picture(tmp_path / "out" / "4.png")[0, 0].tolist() == [0, 255, 0]


def test_two_sliders_make_a_grid_and_a_sweep_moves(runs, tmp_path, call):
    face, out = photo(tmp_path / "face.png", colour=BLACK), tmp_path / "out"
    words = ["--grid", "Smiling=-1:1:3", "Eyeglasses=0:1:2", "--sweep", "Beard.full=-1:1:3", "--animate", "--set", "Smiling=0"]
    code, said, _ = call(edit.app, face, "--model", runs / "painter", *words, "--out", out)
    assert code == 0, said
    table = picture(out / "face-Smiling-Eyeglasses.png")[18::34, 18::34]
    assert table[..., 0].tolist() == [[0, 0], [128, 128], [255, 255]] and table[..., 1].tolist() == [[128, 255]] * 3
    moves = {"face": "", "face-Smiling-Eyeglasses": " Smiling=-1:1:3 Eyeglasses=0:1:2", "face-Beard.full": " Beard.full=-1:1:3"}
    for name, more in moves.items():
        assert Image.open(out / f"{name}.png").text["Sliders"] == f"Smiling=0{more}"
    moving = Image.open(out / "face-Beard.full.webp")
    blue = []
    for frame in range(moving.n_frames):
        moving.seek(frame)
        blue.append(moving.convert("RGB").getpixel((9, 9))[2])
    assert moving.n_frames == 4 and np.abs(np.array(blue) - [0, 128, 255, 128]).max() < 8, "there and back"


def test_a_picture_says_what_made_it_and_nothing_but_ours_is_replaced(runs, tmp_path, call):
    face = photo(tmp_path / "face.png", colour=BLACK)
    photo(tmp_path / "grid.png", colour=RED)
    words = ["--model", runs / "painter", "--set", "Smiling=1", "Beard=full", "--out", tmp_path]
    for _ in range(2):
        code, _, _ = call(edit.app, face, *words)
        assert code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["face-2.png", "face.png", "grid-2.png", "grid.png"]
    assert not picture(face).any() and picture(tmp_path / "grid.png")[0, 0].tolist() == [255, 0, 0]
    text = Image.open(tmp_path / "face-2.png").text
    assert text["Sliders"] == "Smiling=1 Beard.full=1" and text["Model"] == str(runs / "painter") and "3,200" in text["Version"]


def test_one_of_several_faces_is_edited(runs, tmp_path, call, monkeypatch):
    places = [Face(Similarity(1, 0j)), Face(Similarity(1, 200 + 0j))]
    monkeypatch.setattr(photos, "find", lambda *given: places)
    face = photo(tmp_path / "two.png", (378, 218), BLACK)
    words = [face, "--model", runs / "painter", "--set", "Smiling=1", "--paste", "--align", "auto", "--out", tmp_path / "out"]
    code, said, _ = call(edit.app, *words, "--face", "2")
    assert code == 0 and "shows 2 faces; number 2" in said
    pasted = picture(tmp_path / "out" / "two-pasted.png")
    assert pasted[110, 290].tolist() == [255, 0, 0] and not pasted[:, :190].any()
    code, _, said = call(edit.app, *words, "--face", "3")
    assert code == 2 and "shows 2 faces; --face 3" in said


def test_samples_are_made_of_seeds_and_sliders_and_the_next_command_works(tmp_path, call):
    with registered(Drawing):
        run = make_run(tmp_path / "a drawing", {"name": "sham_drawing"})
        code, said, _ = call(sample.app, run, "--set", "Smiling=1", "--count", "3", "--seed", "7", "--out", tmp_path / "out")
        assert code == 0, said
        names = ["grid.png", "seed-7.png", "seed-8.png", "seed-9.png"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
        line = said.splitlines()[-1].removeprefix("next: fader sample ")
        code, said, _ = call(sample.app, *shlex.split(line))
        assert code == 0 and "seed-10.png" in said
        assert "keeps no labels of its training data: what is not set is drawn evenly" in said
        code, said, _ = call(sample.app, run, "--set", "Smiling=1", "--grid", "--only", "--out", tmp_path / "grid")
        assert code == 0 and "drawn evenly" not in said
        assert [path.name for path in (tmp_path / "grid").iterdir()] == ["grid.png"]
        code, said, _ = call(sample.app, run, "--seed", "7", "--to", "9", "--count", "2", "--truncation", "1", "--out", tmp_path / "to")
        assert code == 0, said
        names = ["grid.png", "seed-7-to-9-000.png", "seed-7-to-9-001.png"]
        assert sorted(path.name for path in (tmp_path / "to").iterdir()) == names
        code, _, said = call(sample.app, run, "--seed", "7", "--to", "7", "--out", tmp_path / "no")
        assert code == 2 and "--to takes another seed" in said
        code, _, said = call(sample.app, run, "--set", "Smilling=1", "--out", tmp_path / "no")
        assert code == 2 and "did you mean 'Smiling'" in said
    judge = make_run(tmp_path / "judge", JUDGE)
    code, _, said = call(sample.app, judge, "--out", tmp_path / "no")
    assert code == 2 and "judge does not sample pictures" in said and not (tmp_path / "no").exists()


def test_register_refuses_what_is_no_run(tmp_path, call):
    for words, match in [
        ([tmp_path, "--name", "x"], "is neither a run"),
        ([tmp_path / "gone", "--name", "x"], "there is no such folder"),
        ([make_run(tmp_path / "run", FADER), "--name", "a/b"], "cannot name a registered model"),
    ]:
        code, _, said = call(register.register, *words)
        assert code == 2 and match in said.splitlines()[-1], said


def test_sync_refuses_what_is_no_tracked_run(tmp_path, call):
    code, _, said = call(sync.sync, tmp_path)
    assert code == 2 and "has no tracking spool" in said


def test_what_is_printed_as_next_works(runs, tmp_path, call):
    face = photo(tmp_path / "a face.png")
    _, said, _ = call(edit.app, face, "--model", runs / "painter", "--set", "Smiling=1", "--out", tmp_path / "out")
    [line] = [line for line in said.splitlines() if line.startswith("next: fader edit ")]
    code, _, said = call(edit.app, *shlex.split(line.removeprefix("next: fader edit ")))
    assert code == 0, said
    assert models.load(runs / "painter").attributes.names[0] == "Smiling"
