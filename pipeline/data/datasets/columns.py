"""From cells of a table to attributes: what kind each column is, and the label of each cell.

A cell that is empty, -1 or one of the usual words for it (NA, NULL, None, nan, ?) is unknown. Numbers may be written in
several ways: 1, 1.0 and 01 are one number, and 0,5 is one half. So may accents. Without a word from the user a column is
    binary      when it holds 0 and 1, or no and yes, or false and true;
    continuous  when it holds numbers from 0 to 1, some of them broken;
    k-way       when it holds other whole numbers or words, at most 64 different ones.
Anything else is refused with the words that settle it.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.datasets.splits import NAMES

MOST_CATEGORIES = 64
_SHOWN = 40
_WORDS = ({"no": 0, "yes": 1}, {"false": 0, "true": 1})
_UNKNOWN = {
    "", "nan", "-nan", "na", "n/a", "n.a.", "<na>", "null", "(null)", "<null>", "nil", "nat", "\\n", "?",
    "-", "--", "---", ".", "..", "...", "unknown", "missing", "undefined", "#n/a", "#na", "#n/a n/a", "#null!",
    "unk", "<unk>", "n.d.", "n/d", "nd", "not available", "not known", "unspecified", "<none>", "(blank)", "#n/v", "#nv",
    "#value!", "#ref!", "#div/0!", "#num!", "#name?", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan",
}  # fmt: skip
_QUIET = {"", "nan"}  # of the words for unknown, those that nobody means as a value
_DIGITS = re.compile(r"[+-]?\d{1,40}")
_COMMA = re.compile(r"[+-]?\d+,\d+")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_LIKE_NUMBER = re.compile(r"[+\-\u2212]?[$€£]?\s?\d[\d\s.,'’_]*[%$€£°]?")
_NESTED = re.compile(r"[\[{].*[\]}]", re.DOTALL)
_OF_SPLITS = {"split", "partition", "subset", "set"}
_MOST_APART = 10
"""So many records, each with another value, are no attribute: names or numbers of records are."""
INDEX = re.compile(r"Unnamed: \d+(\.\d+)*|__index_level_\d+__|index|level_\d+")
"""What pandas calls an index when it writes it into a file, or reads one that has no name: no attribute."""

logger = logging.getLogger(__name__)


def text_of(cell: Any) -> str:
    """A cell as text: "" where it is empty, 1 for 1.0, 0 and 1 for false and true."""
    if isinstance(cell, str):
        return cell.strip()
    if cell is None:
        return ""
    if isinstance(cell, bytes):
        return cell.decode(errors="replace").strip()
    return str(int(cell)) if isinstance(cell, bool) or (isinstance(cell, float) and cell.is_integer()) else str(cell)


def is_unknown(text: str) -> bool:
    """Whether a cell's text says that nothing is known. "None", as Python writes it, does; "none" is a word."""
    return text == "None" or text.lower() in _UNKNOWN


def plain(text: str) -> str:
    """The one way to write a number or a word, so that 1, 1.0 and 01 are equal, and é with its accent apart or not."""
    if _DIGITS.fullmatch(text):
        return str(int(text))
    number = _number(text)
    if number is None:
        return unicodedata.normalize("NFC", text)
    return str(int(number)) if number.is_integer() else str(number)


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
        """Read "COLUMN=KIND"; the column `*` means every one that is not named. Raises ValueError: not of that form."""
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
    """The cells of one column. Equal cells are kept once."""

    name: str
    kind: Kind | None = None
    _codes: array = field(default_factory=lambda: array("i"))
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, cell: Any) -> None:
        self._codes.append(self._numbers.setdefault(text_of(cell), len(self._numbers)))

    def add_unknown(self, count: int) -> None:
        """Take the cells of so many records that lack this column."""
        if count:
            self._codes.extend([self._numbers.setdefault("", len(self._numbers))] * count)

    def finish(self) -> tuple[dict[str, Any], np.ndarray, dict[int, str]]:
        """The attribute as `Attributes.to_list` has it, labels [n] float32, and what is wrong with each faulty row.
        Raises ValueError: what kind the column is does not follow from its cells."""
        codes = np.array(self._codes, np.int32)
        values = self.kind.values if self.kind else ()
        known = {code: text for text, code in self._numbers.items() if not self._is_unknown(text)}
        self._tell_unknown(known, codes)
        kind = self.kind or self._guess(list(known.values()))
        known = {code: text if text in values else plain(text) for code, text in known.items()}
        categories = list(values) or (self._categories(set(known.values())) if kind.name == "k-way" else [])
        labels, faults = np.full(len(self._numbers), -1, np.float32), {}
        for code, text in known.items():
            label = _label(text, kind, categories)
            if label is None:
                needed = _needed(kind, categories)
                faults[code] = f"{self.name} is {text[:_SHOWN]!r}; {needed} or an empty cell is needed"
            else:
                labels[code] = label
        entry = {"name": self.name, "kind": kind.name, "categories": categories if kind.name == "k-way" else []}
        bad = {row: faults[code] for row, code in enumerate(codes.tolist()) if code in faults} if faults else {}
        return entry, labels[codes], bad

    def _is_unknown(self, text: str) -> bool:
        if self.kind and (text in self.kind.values or plain(text) in self.kind.values):
            return False
        least = self.kind.low if self.kind and self.kind.name == "continuous" else 0
        return is_unknown(text) or (_number(text) == -1 and least > -1)

    def _tell_unknown(self, known: dict[int, str], codes: np.ndarray) -> None:
        """Log the words that are taken for unknown: somebody may have meant a value."""
        counts = np.bincount(codes, minlength=len(self._numbers)).tolist()
        for text, code in self._numbers.items():
            if code not in known and text.lower() not in _QUIET and _number(text) is None:
                logger.warning(
                    "%s: %r is taken for unknown (%s cells); --kind '%s=k-way:%s,…' with all values makes it one of them",
                    self.name, text, f"{counts[code]:,}", self.name, text,
                )  # fmt: skip

    def _categories(self, texts: set[str]) -> list[str]:
        if not 2 <= len(texts) <= MOST_CATEGORIES:
            allowed = f"a k-way attribute has 2 to {MOST_CATEGORIES}: name the columns to take with --attributes"
            raise self._refusal(f"{len(texts):,} different values", allowed)
        numbers = {text: _number(text) for text in texts}
        least = min(filter(None, numbers.values()), default=0)
        if least < 0 and any(_number(text) == -1 for text in self._numbers):
            remedy = f"empty the cells that are unknown, and say --kind {self.name}=k-way:{least:g},-1,… with all values"
            raise self._refusal(f"-1, which means unknown, beside {least:g}", remedy)
        return sorted(texts) if None in numbers.values() else sorted(texts, key=numbers.__getitem__)

    def _guess(self, texts: list[str]) -> Kind:
        say = f"say what column {self.name} is, as --kind {self.name}="
        if not texts:
            raise ValueError(f"column {self.name} has no known value; leave it out with --attributes, or {say}binary")
        numbers = {text: _number(text) for text in texts}
        self._refuse_no_attribute(texts, numbers, say)
        words = [text for text, number in numbers.items() if number is None]
        odd = next((text for text in words if _LIKE_NUMBER.fullmatch(text)), None)
        if odd:
            remedy = f"write plain numbers, as 1234.5, or {say}k-way if they are names"
            raise self._refusal(f"{odd[:_SHOWN]!r}, which may be a number and may be read in two ways", remedy)
        if len(words) == len(texts):
            lower = {text.lower() for text in texts}
            is_binary = any(lower <= set(pair) for pair in _WORDS)
            if len(lower) < len({*map(plain, texts)}) and not is_binary:
                raise self._refusal("words that differ in capitals alone", f"mend it, or {say}k-way")
            return Kind("binary" if is_binary else "k-way")
        if words:
            raise self._refusal(f"{words[0][:_SHOWN]!r} among numbers", f"mend it, or {say}k-way")
        values = set(numbers.values())
        if values == {1.0} and any(_number(text) == -1 for text in self._numbers):
            remedy = f"{say}binary:-1,1 (or --kind '*=binary:-1,1' for all columns), or {say}binary"
            raise self._refusal("1 and -1 and no 0", f"is -1 absent, as in CelebA's own file, or unknown? {remedy}")
        if values <= {0.0, 1.0}:
            return Kind("binary")
        if all(0 <= number <= 1 for number in values):
            return Kind("continuous")
        low, high = min(values), max(values)
        if low >= 0 and all(number.is_integer() for number in values) and len(values) <= MOST_CATEGORIES:
            return Kind("k-way")
        if low < 0:  # then -1, which is unknown elsewhere, is a number among others
            low = min(low, -1.0) if any(_number(text) == -1 for text in self._numbers) else low
            say = f"empty the cells that are unknown, and {say}k-way:{low:g},… with all values, or --kind {self.name}="
        slider = f"{say}continuous:{low:g}:{high:g} for a slider over that range"
        remedy = f"{slider}, or name the columns to take with --attributes"
        raise self._refusal(f"numbers from {low:g} to {high:g}", remedy)

    def _refusal(self, holds: str, remedy: str) -> ValueError:
        return ValueError(f"column {self.name} holds {holds}; {remedy}")

    def _refuse_no_attribute(self, texts: list[str], numbers: dict[str, float | None], say: str) -> None:
        """Refuse columns that are of other use: splits, names of records, lists."""
        splits = {text.lower() for text in map(plain, texts)} <= NAMES.keys()
        if splits and (not any(numbers.values()) and 0.0 not in numbers.values() or self.name.lower() in _OF_SPLITS):
            remedy = f"take it as them with --split-column {self.name}, leave it out with --attributes, or {say}k-way"
            raise self._refusal(f"{texts[0]!r}, as splits are called", remedy)
        if any(map(_NESTED.fullmatch, texts)):
            raise self._refusal("lists or fields, no labels", "name the columns to take with --attributes")
        names = all(number is None or number.is_integer() for number in numbers.values())
        if names and _MOST_APART <= len(texts) == len(self._codes) <= MOST_CATEGORIES:
            remedy = f"take it with --key {self.name}, name the columns to take with --attributes, or {say}k-way"
            raise self._refusal("another value in each record, so it names them", remedy)


def _number(text: str) -> float | None:
    """The number that a text is, with a point or a comma before its decimals."""
    try:
        comma = _COMMA.fullmatch(text) and not _THOUSANDS.fullmatch(text)
        number = float(text.replace(",", ".") if comma else text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _label(text: str, kind: Kind, categories: Sequence[str]) -> float | None:
    """The label of a known cell; None where the cell holds none of the kind's values."""
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
    """The columns that are attributes: those that are wanted, or all but `others`. kinds: what the user says, as
    `Kind.parse` reads it. Raises ValueError: a name that is not in the header, or nothing is left."""
    said = dict(map(Kind.parse, kinds))
    names = list(wanted) or [name for name in header if name not in others and is_attribute(name, said)]
    for name in [*names, *(name for name in said if name != "*")]:
        if name not in header:
            raise ValueError(f"there is no column {name!r}; there are: {', '.join(header)[:400]}")
    if not names:
        raise ValueError(f"no column is left for attributes; there are: {', '.join(header)[:400]}")
    return [Column(name, said.get(name, said.get("*"))) for name in names]


def is_attribute(name: str, said: Mapping[str, Kind]) -> bool:
    """Whether a column is no index of pandas, or the user says what it is. said: kinds, by column."""
    if name in said or not INDEX.fullmatch(name):
        return True
    logger.info("%s is an index that pandas wrote, and no attribute; --attributes takes it all the same", name)
    return False


def finished(columns: Sequence[Column], count: int) -> tuple[list[dict[str, Any]], np.ndarray, dict[int, str]]:
    """`Column.finish` of all columns together: the attributes, labels [count, A], and what is wrong with each faulty row."""
    parts = [column.finish() for column in columns]
    labels = np.stack([column for _, column, _ in parts], 1) if parts else np.zeros((count, 0), np.float32)
    return [entry for entry, _, _ in parts], labels, {row: why for _, _, bad in parts for row, why in bad.items()}
