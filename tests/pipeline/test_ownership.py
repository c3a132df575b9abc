"""A folder has one owner at a time: a second is refused by name, and one that is gone is noticed, here and elsewhere."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline import ownership
from pipeline.ownership import owned
from tests.commands import environment

ELSEWHERE = json.dumps({"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00", "token": "x"})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ownership, "TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.05)


def hold(path) -> subprocess.Popen[str]:
    """A process that owns the file until it is killed."""
    lines = "import sys, time; from pathlib import Path; from pipeline.ownership import owned\n"
    lines += "with owned(Path(sys.argv[1]), 'it'):\n    print('owned', flush=True)\n    time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", lines, str(path)], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owned\n"
    return process


def test_a_second_process_is_refused_by_name_also_beside_one_that_stands_still(tmp_path, caplog):
    caplog.set_level("INFO")
    first = hold(tmp_path / "lock")
    for stop in (None, signal.SIGSTOP):
        os.kill(first.pid, stop) if stop else None
        with pytest.raises(ValueError, match=f"it belongs to process {first.pid} on .* now"), owned(tmp_path / "lock", "it"):
            pass
    first.kill()
    first.wait()
    with owned(tmp_path / "lock", "it"):
        pass
    assert f"it was left by process {first.pid}" in caplog.text


def test_one_after_another_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    for _ in range(3):
        with owned(tmp_path / "lock", "it"):
            pass


@pytest.mark.parametrize("lock", ["not carried to other machines", "not there"])
def test_an_owner_on_another_machine_is_refused_while_it_touches_its_file(tmp_path, monkeypatch, caplog, lock):
    path, over = tmp_path / "lock", threading.Event()
    path.write_text(ELSEWHERE)
    if lock == "not there":
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))

    def touch() -> None:
        while not over.wait(0.1):
            os.utime(path)

    living = threading.Thread(target=touch)
    living.start()
    try:
        with pytest.raises(ValueError, match="it belongs to process 7 on elsewhere .since 2026-01-01 00:00:00. now"), owned(path, "it"):
            pass
    finally:
        over.set()
        living.join()
    began = time.monotonic()
    with owned(path, "it"):
        assert time.monotonic() - began < 10
    assert "left by process 7 on elsewhere" in caplog.text
    path.write_text(ELSEWHERE)
    os.utime(path, (1, 1))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits for one that is long gone"))
    with owned(path, "it"):
        pass


def test_an_owner_keeps_its_file_touched_and_notices_that_it_was_taken_over(tmp_path):
    path = tmp_path / "lock"
    with owned(path, "it") as owner:
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        owner.check()
        assert path.stat().st_mtime_ns > before
        path.write_text(ELSEWHERE)
        with pytest.raises(ValueError, match="it was taken over by process 7 on elsewhere"):
            owner.check()
    assert path.read_text() == ELSEWHERE, "the new owner's name stays"


def test_those_who_share_keep_an_owner_out(tmp_path):
    path = tmp_path / "lock"
    with owned(path, "it", shared=True), owned(path, "it", shared=True):
        with pytest.raises(ValueError, match="it belongs to another process now"), owned(path, "it"):
            pass
    with owned(path, "it"), pytest.raises(ValueError, match="it belongs to process"), owned(path, "it", shared=True):
        pass
