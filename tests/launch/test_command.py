"""The command line as a whole: help, unknown words, exit codes, and one line for what a user can mend."""

from __future__ import annotations

import getpass
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from launch import command
from launch.cli import COMMANDS
from pipeline import tracking
from tests.commands import ROOT, environment, launch
from tests.runs import make_store
from tests.test_docs_commands import read_by_its_parser


def test_help_names_every_command():
    done = launch("launch.cli", "--help")
    assert all(f"fader {name}" in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_refused():
    assert "there is no command 'trian'" in launch("launch.cli", "trian", code=2).stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name):
    assert "Usage" in launch("launch.cli", name, "--help").stdout


@pytest.mark.parametrize("name", ["verify", "evaluate", "register", "edit"])
def test_a_missing_argument_or_unknown_option_is_no_traceback(name):
    for words in ([], ["--no-such-option"]):
        done = launch("launch.cli", name, *words, code=2)
        assert "Traceback" not in done.stderr and done.stderr.strip()


UNKNOWN = "import pwd\ndef unknown(*_):\n    raise KeyError('uid not found')\npwd.getpwuid = unknown\n"


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """As in `docker run --user 54321`: no HOME, and no entry among the users."""
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    (tmp_path / "sitecustomize.py").write_text(UNKNOWN)
    monkeypatch.setattr(pwd, "getpwuid", lambda *_: (_ for _ in ()).throw(KeyError("uid not found")))


def test_a_command_has_a_home_and_a_user_name_in_a_container_that_has_neither(nobody, call):
    with pytest.raises(RuntimeError):
        Path.home()
    code, said, _ = call(lambda: print(Path.home(), getpass.getuser()))
    assert code == 0 and said.split() == [tempfile.gettempdir(), str(os.getuid())]


def test_a_run_is_tracked_in_a_container_without_home_and_user_name(nobody, tmp_path):
    lines = "from pipeline.tracking import MlflowTracker\ntracker = MlflowTracker('run', 'e', 'n')\ntracker.start()\n"
    lines += "tracker.log({'a': 1.0}, 1, 1)\ntracker.finish('FINISHED', 300)"
    here = environment(PYTHONPATH=f"{tmp_path}:{ROOT}", MLFLOW_TRACKING_URI=make_store(tmp_path))
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, env=here, check=True)
    assert tracking.run_id_of(tmp_path / "run") and tracking.undelivered(tmp_path / "run") == 0


@pytest.mark.parametrize("name", ["evaluate", "inspect", "sample", "prepare"])
def test_a_seed_that_torch_does_not_take_is_refused(name):
    before = ["faces"] if name == "prepare" else []
    for seed in ("-1", str(10**30)):
        with pytest.raises(command.ClickException) as error:
            read_by_its_parser(name, [*before, "--seed", seed, "x"])
        assert "--seed" in error.value.format_message()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("two\nlines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file or directory", "here.txt"), 2, "error: No such file or directory: here.txt"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_errors_end_as_one_line_and_a_code(monkeypatch, capsys, error, code, says):
    monkeypatch.setattr("sys.argv", ["x"])

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command.main(fail)
    assert ended.value.code == code
    assert says in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        command.main(lambda: __import__("psycopg_that_nobody_has"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said and "the Python package psycopg_that_nobody_has" in said


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_bug_keeps_its_traceback_but_shows_no_password(monkeypatch, capsys, error):
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setenv("FADER_TRACEBACK", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@h")

    def fail() -> None:
        raise error("a bug at http://me:hidden@h, with hidden")

    with pytest.raises(SystemExit) as ended:
        command.main(fail)
    said = capsys.readouterr().err
    assert ended.value.code == (2 if error is ValueError else 1)
    assert "Traceback" in said and "in fail" in said and "a bug at http://h, with ***" in said and "hidden" not in said
