"""Words NAME=VALUE on a command line, for the commands that move sliders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pipeline.models import Capability, Slider

Checkpoint = Annotated[str, typer.Option(help="of a run: latest, best or images-N")]
Raw = Annotated[bool, typer.Option("--raw", help="a run's weights as trained, not their moving averages")]
Pictures = Annotated[Path, typer.Option(help="the folder to write pictures into", metavar="DIR")]
Moves = Annotated[list[str] | None, typer.Option("--set", help="-1 absent, 1 present; Beard=full", metavar="NAME=X...")]

_SEVERAL = ("--set", "--sweep", "--grid", "--attributes")
_MAX_STEPS = 101


class SeveralValues(TyperCommand):
    """Lets `--set A=1 B=2` stand for `--set A=1 --set B=2`: the words NAME=VALUE that follow are its values too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        option: str | None = None
        for word in args:
            if word.startswith("-"):
                option = word if word in _SEVERAL else None
            elif option and words[-1] != option:
                if "=" in word and not Path(word).exists():
                    words.append(option)
                else:
                    option = None
            words.append(word)
        return super().parse_args(ctx, words)


def sliders(capability: Capability, words: Sequence[str] | None) -> list[Slider]:
    return [capability.slider(*_pair(word, "--set")) for word in words or []]


def labels(capability: Capability, words: Sequence[str] | None) -> dict[str, float]:
    pairs = [_pair(word, "--attributes") for word in words or []]
    return {name: capability.label(name, value) for name, value in pairs}


def sweep(capability: Capability, word: str) -> tuple[str, list[Slider]]:
    """Read `Smiling=-2:2:9` as its name and nine sliders."""
    name, span = _pair(word, "--sweep")
    parts = span.split(":")
    if len(parts) != 3 or not parts[2].isdigit() or not 2 <= int(parts[2]) <= _MAX_STEPS:
        raise ValueError(f"--sweep {word}: write NAME=FROM:TO:STEPS with 2 to {_MAX_STEPS} steps, as Smiling=-2:2:9")
    first, last = (capability.slider(name, value).value for value in parts[:2])
    count = int(parts[2])
    values = [first + (last - first) * i / (count - 1) for i in range(count)]
    return name, [capability.slider(name, value) for value in values]


def crossed(capability: Capability, words: Sequence[str] | None) -> dict[str, tuple[list[Slider], list[Slider]]]:
    """Read `Smiling=-2:2:5 Male=-1:1:3` as the steps of two sliders, by a name of both."""
    if not words:
        return {}
    if len(words) != 2:
        raise ValueError("--grid takes two sliders, down and across: --grid Smiling=-2:2:5 Male=-2:2:5")
    (down, rows), (across, columns) = (sweep(capability, word) for word in words)
    if rows[0].attribute == columns[0].attribute:
        raise ValueError(f"--grid {' '.join(words)}: take two attributes")
    return {f"{down}-{across}": (rows, columns)}


def check_folder(out: Path) -> None:
    """Raises ValueError before any work when `--out` cannot be written."""
    there = out
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {there} cannot be written; name another folder")


def _pair(word: str, option: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option} {word}: write NAME=VALUE, as {option} Smiling=1")
    return name, value
