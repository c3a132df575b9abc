"""From cells of a table to attributes: what kind each column is, and the label of each cell.

A cell that is empty, -1 or nan is unknown. Without a word from the user a column is
    binary      when it holds 0 and 1, or no and yes, or false and true;
    continuous  when it holds numbers from 0 to 1, some of them broken;
    k-way       when it holds other whole numbers or words, at most 64 different ones.
Anything else is refused with the words that settle it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_CATEGORIES = 64
_SHOWN = 40
_UNKNOWN = ("", "nan")
_WORDS = ({"no": 0, "yes": 1}, {"false": 0, "true": 1})


@dataclass(frozen=True)
class Kind:
    """What the user says of a column.

    `binary`, `binary:ABSENT,PRESENT`, `k-way`, `k-way:FIRST,SECOND,…`, `continuous`, `continuous:LOW:HIGH` (mapped to
    [0, 1]).
    """

    name: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    @staticmethod
    def parse(text: str) -> tuple[str, Kind]:
        """Of "COLUMN=KIND"; the column `*` means every one that is not named.

        Raises:
            ValueError: not of that form.
        """
        column, equals, kind = text.rpartition("=")
        name, _, rest = kind.partition(":")
        try:
            if not equals or not column:
                raise ValueError("no COLUMN=")
            if name == "continuous":
                low, high = map(float, rest.split(":")) if rest else (0.0, 1.0)
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise ValueError("no range")
                return column, Kind(name, low=low, high=high)
            values = tuple(rest.split(",")) if rest else ()
            if name not in ("binary", "k-way") or len(set(values)) < len(values):
                raise ValueError("no kind")
            if values and (len(values) < 2 or (name == "binary" and len(values) != 2)):
                raise ValueError("wrong number of values")
            return column, Kind(name, values)
        except ValueError as error:
            raise ValueError(
                f"--kind is {text!r}; one of COLUMN=binary, COLUMN=binary:ABSENT,PRESENT, COLUMN=k-way, "
                "COLUMN=k-way:FIRST,SECOND,THIRD, COLUMN=continuous, COLUMN=continuous:LOW:HIGH is needed"
            ) from error


@dataclass
class Column:
    """The cells of one column, each different one kept once."""

    name: str
    kind: Kind | None = None
    _codes: array = field(default_factory=lambda: array("i"))
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, cell: Any) -> None:
        """The next record's cell: text, a number, true or false, or None."""
        if cell is None:
            text = ""
        elif isinstance(cell, bool):
            text = str(int(cell))
        elif isinstance(cell, float) and cell.is_integer():
            text = str(int(cell))
        else:
            text = str(cell).strip()
        self._codes.append(self._numbers.setdefault(text, len(self._numbers)))

    def finish(self) -> tuple[dict[str, Any], np.ndarray, dict[int, str]]:
        """The attribute as `Attributes.to_list` has it, labels [n] float32, and what is wrong with each faulty row.

        Raises:
            ValueError: what kind the column is does not follow from its cells.
        """
        meanings, entry, faults = self._read()
        labels = np.array([meanings.get(number, -1.0) for number in range(len(meanings))], np.float32)
        codes = np.frombuffer(self._codes, np.int32) if self._codes else np.zeros(0, np.int32)
        bad = {row: faults[code] for row, code in enumerate(codes.tolist()) if code in faults} if faults else {}
        return entry, labels[codes] if len(codes) else np.zeros(0, np.float32), bad

    def _read(self) -> tuple[dict[int, float], dict[str, Any], dict[int, str]]:
        """Label of each different cell, the attribute, and the fault of each faulty cell."""
        known = {text: number for text, number in self._numbers.items() if not self._unknown(text)}
        kind = self.kind or self._guess(list(known))
        categories = list(kind.values) or (self._categories(list(known)) if kind.name == "k-way" else [])
        meanings, faults = dict.fromkeys(self._numbers.values(), -1.0), {}
        for text, number in known.items():
            label = _label(text, kind, categories)
            if label is None:
                needed = _needed(kind, categories)
                faults[number] = f"{self.name} is {text[:_SHOWN]!r}; {needed} or an empty cell is needed"
            else:
                meanings[number] = label
        entry = {"name": self.name, "kind": kind.name, "categories": categories if kind.name == "k-way" else []}
        return meanings, entry, faults

    def _unknown(self, text: str) -> bool:
        if self.kind and text in self.kind.values:
            return False
        if text.lower() in _UNKNOWN:
            return True
        number = _number(text)
        return number == -1 and not (self.kind and self.kind.name == "continuous" and self.kind.low <= -1)

    def _categories(self, texts: list[str]) -> list[str]:
        if not 2 <= len(texts) <= MOST_CATEGORIES:
            raise ValueError(
                f"column {self.name} holds {len(texts):,} different values; a k-way attribute has 2 to "
                f"{MOST_CATEGORIES}: name the columns to take with --attributes"
            )
        numbers = [_number(text) for text in texts]
        if all(number is not None for number in numbers):
            return [text for _, text in sorted(zip(numbers, texts))]
        return sorted(texts)

    def _guess(self, texts: list[str]) -> Kind:
        say = f"say what column {self.name} is, as --kind {self.name}="
        if not texts:
            raise ValueError(f"column {self.name} has no known value; leave it out with --attributes, or {say}binary")
        numbers = [number for number in map(_number, texts) if number is not None]
        if not numbers:
            lower = {text.lower() for text in texts}
            return Kind("binary") if any(lower <= set(words) for words in _WORDS) else Kind("k-way")
        if len(numbers) < len(texts):
            word = next(text for text in texts if _number(text) is None)
            raise ValueError(f"column {self.name} holds {word[:_SHOWN]!r} among numbers; mend it, or {say}k-way")
        found = set(numbers)
        if found == {1.0} and any(_number(text) == -1 for text in self._numbers):
            raise ValueError(
                f"column {self.name} holds 1 and -1 and no 0: is -1 absent, as in CelebA's own file, or unknown? "
                f"{say}binary:-1,1 (or --kind '*=binary:-1,1' for all columns), or {say}binary"
            )
        if found <= {0.0, 1.0}:
            return Kind("binary")
        if all(0 <= number <= 1 for number in found):
            return Kind("continuous")
        if all(number.is_integer() for number in found) and len(found) <= MOST_CATEGORIES:
            return Kind("k-way")
        low, high = min(found), max(found)
        raise ValueError(
            f"column {self.name} holds numbers from {low:g} to {high:g}; {say}continuous:{low:g}:{high:g} for a slider "
            f"over that range, or name the columns to take with --attributes"
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _label(text: str, kind: Kind, categories: Sequence[str]) -> float | None:
    """The label of a known cell, or None where it is none of the kind's values."""
    if kind.name == "continuous":
        number = _number(text)
        if number is None or not kind.low <= number <= kind.high:
            return None
        return (number - kind.low) / (kind.high - kind.low)
    if kind.name == "k-way" or kind.values:
        return float(categories.index(text)) if text in categories else None
    number = _number(text)
    if number in (0.0, 1.0):
        return number
    return next((float(words[text.lower()]) for words in _WORDS if text.lower() in words), None)


def _needed(kind: Kind, categories: Sequence[str]) -> str:
    if kind.name == "continuous":
        return f"a number from {kind.low:g} to {kind.high:g}"
    return ", ".join(categories) if categories else "0, 1"


def choose(header: Sequence[str], wanted: Sequence[str], kinds: Sequence[str], others: Sequence[str]) -> list[Column]:
    """The columns that are attributes.

    Args:
        header: names of all columns.
        wanted: names the user asks for; none takes all but `others`.
        kinds: what the user says, as `Kind.parse` reads it.
        others: columns that have another use.

    Raises:
        ValueError: a name that is not in the header, or nothing is left.
    """
    said = dict(map(Kind.parse, kinds))
    names = list(wanted) or [name for name in header if name not in others]
    for name in [*names, *(name for name in said if name != "*")]:
        if name not in header:
            raise ValueError(f"there is no column {name!r}; there are: {', '.join(header)[:400]}")
    if not names:
        raise ValueError(f"no column is left for attributes; there are: {', '.join(header)[:400]}")
    return [Column(name, said.get(name, said.get("*"))) for name in names]
