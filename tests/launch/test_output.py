"""Output is no reason to end: a closed pipe, a full disk, a closed stream or an encoding that lacks a letter costs words only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, command, environment
from tests.launch.test_train import CONFIG, checkpoints

SPEAK = """
import logging, sys, typer
from launch.command import main

def speak() -> None:
    for _ in range(5000):
        typer.echo("λ = 0.1 ✓ Straße")
        print("λ", file=sys.stderr)
        logging.getLogger("x").warning("λ")
    from rich.console import Console
    Console().print("λ", "table")

main(speak)
"""
STREAMS = {
    "both on a full disk": ">/dev/full 2>/dev/full",
    "both closed": "<&- >&- 2>&-",
    "nobody reads": "2>&1 | head -1; exit ${PIPESTATUS[0]}",
}


def shell(line: list[str], streams: str, **extra: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", f'"$@" {streams}', "bash", *line]
    about = {"cwd": ROOT, "env": environment(**extra), "timeout": 600}
    return subprocess.run(words, capture_output=True, text=True, errors="replace", **about)


@pytest.mark.parametrize("streams", STREAMS)
def test_no_stream_ends_a_command(streams):
    done = shell([sys.executable, "-c", SPEAK], STREAMS[streams])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_full_disk_under_the_results_is_told_of():
    done = shell([sys.executable, "-c", SPEAK], ">/dev/full")
    assert done.returncode == 0 and "note: standard output is not whole: No space left on device" in done.stderr


def test_what_the_encoding_lacks_is_replaced():
    done = shell([sys.executable, "-c", SPEAK], "", PYTHONIOENCODING="latin-1", LC_ALL="C")
    assert done.returncode == 0 and done.stdout.count("? = 0.1 ? Stra") == 5000


@pytest.mark.parametrize("name", ["", "train", "edit"])
def test_help_and_errors_end_as_they_should_without_streams(name):
    words = [sys.executable, "-m", "launch.cli", *([name] if name else [])]
    assert shell([*words, "--help"], STREAMS["both closed"]).returncode == 0
    assert shell([*words, "--no-such-option"], STREAMS["both on a full disk"]).returncode == 2


def test_a_run_trains_to_its_end_with_both_streams_closed(faces, tmp_path):
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG.replace("FACES", str(faces)).replace("PRECISION", "fp32"))
    words = ["method.images=160", "run.log_images=8", f"run.folder={run}"]
    done = shell(command("launch.train", config, *words), STREAMS["both closed"], FADER_EXIT_FILE=str(tmp_path / "exit"))
    assert done.returncode == 0, done.stderr
    assert checkpoints(run)[-1].name.endswith("160") and (tmp_path / "exit").read_text() == "0\n"
    assert Path(run / "run.json").is_file()
