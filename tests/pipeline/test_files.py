"""Files and folders are there whole, as before or as given, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os

import pytest

from pipeline import files


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_replaced_whole_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    assert files.write_whole(path, "before") == path
    files.write_json(path, {"é": 1}, indent=None)
    assert path.read_text() == '{"\\u00e9": 1}\n' and names(tmp_path) == ["a", "b.json"]


@pytest.mark.parametrize("work", ["beside it", "in a folder for unfinished files"])
def test_an_exception_leaves_the_file_as_it_was(tmp_path, work):
    path, folder = tmp_path / "a", tmp_path / "work"
    folder.mkdir()
    files.write_whole(path, "before")
    with pytest.raises(OSError, match="disk is full"), files.replacing(path, folder if "folder" in work else None) as file:
        file.write(b"after")
        file.flush()
        assert len(names(tmp_path)) == 3, "the unfinished file has another name"
        raise OSError("the disk is full")
    assert path.read_text() == "before" and names(tmp_path) == ["a", "work"]


def test_a_file_has_the_rights_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "sub" / "export"
    for text in ("before", "after"):
        with files.replacing_folder(path) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "a").write_text(text)
        assert (path / "inner" / "a").read_text() == text
    assert names(tmp_path) == ["a", "export", "inner", "sub"]


def test_an_exception_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    path, replace = tmp_path / "export", os.replace
    with files.replacing_folder(path) as folder:
        (folder / "a").write_text("before")
    with pytest.raises(ValueError, match="half-way"), files.replacing_folder(path):
        raise ValueError("half-way")

    def refused(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("refused")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="refused"), files.replacing_folder(path):
        pass
    assert (path / "a").read_text() == "before" and names(tmp_path) == ["a", "export"]


def test_files_are_all_written_or_none(tmp_path, monkeypatch):
    """The disk fills up at the second file: the first is not left behind, nor is what stood there before touched."""
    assert files.write_all(tmp_path / "out", {"a": b"old", "b": b"old"}) == [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    real, opened = files.replacing, []

    @contextlib.contextmanager
    def full(path):
        opened.append(path)
        with real(path) as file:
            yield open("/dev/full", "wb") if len(opened) == 2 else file

    monkeypatch.setattr(files, "replacing", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_all(tmp_path / "out", {"a": b"new", "b": b"new"})
    assert names(tmp_path) == ["a", "b", "out"] and (tmp_path / "out" / "a").read_bytes() == b"old"


def test_any_name_of_an_attribute_makes_the_name_of_one_file():
    assert [files.file_name(name) for name in ("hair/blond", "../a b", "Smiling", "größe-1.5")] == [
        "hair_blond", ".._a_b", "Smiling", "größe-1.5",
    ]  # fmt: skip
