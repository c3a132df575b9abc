"""Fixtures that the tests of commands share."""

from __future__ import annotations

import sys

import pytest

from launch import command


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(what, *words):
        monkeypatch.setattr(sys, "argv", ["fader", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command.main(what)
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run
