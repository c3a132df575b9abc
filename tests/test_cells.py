"""Cells run in turns, each in a process of its own, and the fault of one costs only its row."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import cells

NOTES = "CELLS_NOTES"  # the file in which cells note when they began and ended


def note(name: str, word: str) -> None:
    with open(os.environ[NOTES], "a") as file:
        file.write(f"{name} {word}\n")


def meeting(name: str, other: str) -> dict:
    """Passes if the other cell runs at the same time."""
    note(name, "begins")
    deadline = time.monotonic() + 30
    while f"{other} begins" not in Path(os.environ[NOTES]).read_text():
        assert time.monotonic() < deadline, f"{other} does not run beside {name}"
        time.sleep(0.01)
    note(name, "ends")
    return {"met": other}


def one() -> dict:
    return meeting("one", "two")


def two() -> dict:
    return meeting("two", "one")


def timed() -> dict:
    note("timed", "begins")
    time.sleep(0.1)
    note("timed", "ends")
    return {}


def timed_too() -> dict:
    return timed()


def wrong() -> dict:
    raise ValueError("planted")


def crash() -> dict:
    os._exit(7)


def endless() -> dict:
    """Never ends, and neither does a process that it started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note(str(child.pid), "is the child")
    time.sleep(600)
    return {}


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Path:
    limits = {one: 60, two: 60, wrong: 60, crash: 60, endless: 2, timed: 60, timed_too: 60}
    registered = {f.__name__: cells.Cell(f, seconds, f in (timed, timed_too)) for f, seconds in limits.items()}
    monkeypatch.setattr(cells, "CELLS", registered)
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    (tmp_path / "notes").touch()
    return tmp_path / "notes"


def test_cells_that_time_nothing_run_together_and_the_others_alone(notes):
    rows = {row["cell"]: row for row in cells.run_cells(["timed", "one", "timed_too", "two"], imports="json")}
    assert all(row["passed"] for row in rows.values()), rows
    assert rows["one"]["met"] == "two" and list(rows)[2:] == ["timed", "timed_too"]
    assert notes.read_text().split("\n")[-5:] == ["timed begins", "timed ends"] * 2 + [""]


def test_a_fault_costs_only_its_row_and_leaves_no_process(notes):
    rows = {row["cell"]: row for row in cells.run_cells(["wrong", "crash", "endless", "timed"], imports="json")}
    assert [name for name, row in rows.items() if row["passed"]] == ["timed"]
    assert "ValueError: planted" in rows["wrong"]["error"] and "exit code 7" in rows["crash"]["error"]
    assert "in time" in rows["endless"]["error"] and rows["endless"]["seconds"] < 30
    child = int(notes.read_text().split(" is the child")[0].split("\n")[-1])
    deadline = time.monotonic() + 10
    while running(child):
        assert time.monotonic() < deadline, "what a cell started outlives it"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
