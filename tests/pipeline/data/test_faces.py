"""Drawn faces: deterministic, their labels true to the pixels, the same person whatever the labels."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.datasets import faces
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.datasets.faces import BEARDS, RATES, draw_face, face_labels, jpeg_bytes, read_faces
from tests.pipeline.planted import records

NONE = {"Eyeglasses": 0, "Smiling": 0, "Wearing_Hat": 0, "Blond_Hair": 0, "Beard": 0}


def changed(first: dict[str, int], second: dict[str, int], index: int) -> np.ndarray:
    """[218, 178] how much the two drawings of one person differ."""
    a, b = (np.asarray(draw_face(5, index, **{**NONE, **labels}), np.int16) for labels in (first, second))
    return np.abs(a - b).max(2)


def test_a_face_is_a_function_of_seed_and_index():
    assert draw_face(3, 8).tobytes() == draw_face(3, 8).tobytes()
    assert draw_face(3, 8).tobytes() != draw_face(4, 8).tobytes()
    assert draw_face(3, 8).tobytes() != draw_face(3, 9).tobytes()
    assert draw_face(3, 8, **face_labels(3, 8)).tobytes() == draw_face(3, 8).tobytes()
    assert draw_face(0, 0).size == (178, 218) and draw_face(0, 0).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("Eyeglasses", (85, 145), (20, 158)), ("Smiling", (95, 180), (40, 140)), ("Wearing_Hat", (0, 118), (0, 178))],
)
def test_a_label_changes_its_own_place_and_nothing_else(name, rows, columns):
    for index in range(25):
        where = changed({}, {name: 1}, index)
        assert (where > 40).sum() > 250, f"{name} cannot be seen on face {index}"
        where[rows[0] : rows[1], columns[0] : columns[1]] = 0
        assert where.max() <= 3, f"{name} changed something elsewhere on face {index}"


def test_all_values_of_beard_differ_by_pairs():
    for index in range(25):
        for first, second in ((0, 1), (0, 2), (1, 2)):
            where = changed({"Beard": first}, {"Beard": second}, index)
            assert (where[125:] > 30).sum() > 250 and where[:95].max() <= 3


def test_blond_hair_is_yellow_bright_and_visible_under_a_hat_too():
    for index in range(25):
        for hat in (0, 1):
            where = changed({"Wearing_Hat": hat}, {"Wearing_Hat": hat, "Blond_Hair": 1}, index) > 60
            assert where[20:198].sum() > 500
            dark, blond = (
                np.asarray(draw_face(5, index, **{**NONE, "Wearing_Hat": hat, "Blond_Hair": b}), float) for b in (0, 1)
            )
            brighter = blond[where].mean() - dark[where].mean()
            yellower = np.diff((blond - dark)[where][:, [2, 0]]).mean()
            assert brighter > 25 and brighter + yellower > 100


def test_labels_are_independent_and_have_their_rates():
    drawn = [face_labels(3, index) for index in range(6000)]
    table = np.array([[label[name] for name in (*RATES, "Beard")] for label in drawn], float)
    for j, rate in enumerate(RATES.values()):
        assert abs(table[:, j].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 6000)
    assert 0.04 < table[:, 0].mean() < 0.08, "one attribute is rare"
    assert np.allclose(np.bincount(table[:, 4].astype(int)) / 6000, 1 / 3, atol=0.025)
    correlation = np.corrcoef(table.T) - np.eye(5)
    assert np.abs(correlation).max() < 0.06


def test_the_eyes_are_where_celeba_has_them():
    """The iris is dark on white: over many people, wherever the pose puts them, the eyes average to CelebA's places."""
    mean = np.mean([np.asarray(draw_face(2, i, **NONE).convert("L"), float) for i in range(60)], 0)
    for x in (69, 108):
        patch = mean[95:127, x - 16 : x + 16]
        dark = np.maximum(patch.mean() - patch, 0) ** 2
        assert abs((dark * np.arange(32)).sum() / dark.sum() - 16) < 4


def test_impossible_labels_are_refused():
    for forced in ({"Smilling": 1}, {"Beard": 3}, {"Smiling": 2}):
        with pytest.raises(ValueError, match="attributes are Eyeglasses, Smiling"):
            draw_face(0, 0, **forced)


def test_the_files_are_celebas_own_format_and_the_celeba_reader_reads_them(tmp_path):
    dataset = read_faces(tmp_path, count=20, seed=4)
    lines = (tmp_path / "list_attr_celeba.txt").read_bytes().split(b"\r\n")
    assert lines[0] == b"20" and lines[1].endswith(b" ") and b"  1" in b"".join(lines[2:])
    assert read_celeba(tmp_path).attributes.names == tuple(RATES)
    assert dataset.attributes.names == (*RATES, "Beard") and dataset.attributes[4].categories == BEARDS
    assert [dataset.splits.count(split) for split in ("train", "valid", "test")] == [16, 2, 2]
    for index, record in enumerate(records(dataset)):
        assert dict(zip(dataset.attributes.names, record.labels.astype(int).tolist())) == face_labels(4, index)
        assert dataset.read(record.location) == jpeg_bytes(draw_face(4, index))


def test_workers_and_interruptions_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "_CHUNK", 8)
    sets = [read_faces(tmp_path / str(workers), count=24, workers=workers) for workers in (1, 2)]
    files = [sorted(path.relative_to(tmp_path / w) for path in (tmp_path / w).rglob("*")) for w in ("1", "2")]
    assert files[0] == files[1] and sets[0].digest() == sets[1].digest()
    kept = tmp_path / "1/img_align_celeba/000002.jpg"
    before = kept.stat().st_mtime_ns
    (tmp_path / "1/img_align_celeba/000003.jpg").unlink()
    again = read_faces(tmp_path / "1", count=24)
    assert kept.stat().st_mtime_ns == before and again.read("000003.jpg") == sets[1].read("000003.jpg")


def test_other_faces_in_the_folder_are_refused(tmp_path):
    read_faces(tmp_path, count=10)
    with pytest.raises(ValueError, match="holds other drawn faces"):
        read_faces(tmp_path, count=10, seed=1)
    with pytest.raises(ValueError, match="at least 10 pictures"):
        read_faces(tmp_path / "few", count=9)
