"""The command line as a whole: help, unknown words, exit codes, and one line for what a user can mend."""

from __future__ import annotations

import pytest
import typer

from launch import command
from launch.cli import COMMANDS
from tests.commands import launch
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


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])

    def fail() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        command.main(fail)
