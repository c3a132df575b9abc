"""`fader app` as a user starts it, and the page inside a built wheel."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from pipeline.app import server
from tests.commands import ROOT, command, environment, interruptible
from tests.page import person, photo
from tests.runs import FADER, JUDGE, make_run
from tests.warm import forked


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    make_run(folder / "judge", JUDGE)
    return make_run(folder / "run", FADER, judge=str(folder / "judge"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_serves_until_it_is_told_to_stop(run, tmp_path, host):
    """It is real: a process, networks, an address read off the terminal. A token guards what others reach."""
    line = command("launch.app", "--model", run, "--host", host, "--port", "0")
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=interruptible,
    )  # fmt: skip
    try:
        said = ""
        while "open http" not in said:
            said += (read := process.stdout.readline())
            assert read, said
        port, _, token = re.search(r"open http://[\d.]+:(\d+)/(#(\S+))?", said).groups()
        assert (token is None) == (host == "127.0.0.1"), said
        query = f"?token={token}" if token else ""
        until = time.monotonic() + 120
        while True:
            try:
                with person(f"127.0.0.1:{port}", query=query) as one:
                    assert one.give(photo((9, 200, 90)))["kind"] == "face"
                    assert one.move(Smiling=1.5).shape == (32, 32, 3)
                break
            except ConnectionError:
                assert time.monotonic() < until, "the port does not answer"
                time.sleep(0.1)
        if token:
            for query in ("", "?token=wrong"):
                with pytest.raises(InvalidStatus, match="403"), person(f"127.0.0.1:{port}", query=query):
                    pass
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "Traceback" not in said, said
    assert not list(tmp_path.iterdir()), "it wrote into its folder"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--model", "gone"], "gone: there is no such folder"),
        (["--model", "JUDGE"], "judge neither edits photos nor samples faces"),
        (["--model", "RUN", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--model", "RUN", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: Cannot assign requested address"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(run, tmp_path, words, match):
    names = {"RUN": str(run), "JUDGE": str(run.with_name("judge"))}
    given = [*(names.get(word, word) for word in words), "--port", "0"]
    done = forked("launch.app", *given, cwd=tmp_path, code=2)
    assert match in done.stderr and "Traceback" not in done.stderr


def test_a_built_wheel_holds_the_page(tmp_path):
    for name in ("fader", "pipeline", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    line = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "built"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        for name, _ in server.FILES.values():
            assert built.read(f"pipeline/app/page/{name}") == (server.PAGE / name).read_bytes()
        assert built.read("pipeline/evaluation/page.css"), "a report is drawn with it"
