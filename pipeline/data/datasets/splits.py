"""Splits of sets: as they are given, or by a hash, which keeps every record where it is when the set grows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.datasets.record import SPLITS

NAMES = {
    **dict.fromkeys(("train", "training", "trn", "0"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev", "1"), "valid"),
    **dict.fromkeys(("test", "testing", "2"), "test"),
}
"""What sets call their splits; the numbers are CelebA's."""

_HASH = hashlib.blake2b(digest_size=8, person=b"split")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shares:
    """Percent of train, valid and test. A record's split is a function of its name alone."""

    percent: tuple[int, int, int] = (80, 10, 10)

    @staticmethod
    def parse(text: str) -> Shares:
        """Read "80/10/10". Raises ValueError: not three whole numbers that sum to 100."""
        parts = text.split("/")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts) or sum(map(int, parts)) != 100:
            raise ValueError(f"--split is {text!r}; three whole numbers that sum to 100 are needed, as 80/10/10")
        train, valid, test = map(int, parts)
        return Shares((train, valid, test))

    def of(self, name: str) -> str:
        hashed = _HASH.copy()  # making one anew takes twice as long
        hashed.update(name.encode("utf-8", "surrogateescape"))
        place = int.from_bytes(hashed.digest()) * 100 * 2.0**-64
        train, valid, _ = self.percent
        return "train" if place < train else "valid" if place < train + valid else "test"

    def __str__(self) -> str:
        return "/".join(map(str, self.percent))


def assign(
    keys: Sequence[str], *, given: Sequence[str] | None = None, groups: Sequence[str | None] | None = None,
    shares: Shares | None = None,
) -> tuple[list[str], str]:
    """The split of each record, and how it came about, in words.

    groups: records of one name stand in one split, and one without a name stands alone; None: each by its key. shares
    override what is given. Without either they are 80/10/10; where valid or test is missing, a tenth of train becomes it.
    """
    by = "its key" if groups is None else "its group"
    names = [key if group is None else group for key, group in zip(keys, groups or [None] * len(keys), strict=True)]
    if shares or given is None:
        shares = shares or Shares()
        splits, how = [shares.of(name) for name in names], f"{shares} by a hash of {by}"
    else:
        splits, how = list(given), "as given"
        missing = [split for split in SPLITS[1:] if split not in given]
        if missing and "train" in given:
            valid, test = (10 * (split in missing) for split in SPLITS[1:])
            tenths = Shares((100 - valid - test, valid, test))
            splits = [tenths.of(name) if split == "train" else split for name, split in zip(names, splits)]
            shares = tenths
            how += f"; it gives no {' and no '.join(missing)} records: its train records {tenths} by a hash of {by}"
    _warn(splits, groups, shares)
    return splits, how


def _warn(splits: list[str], groups: Sequence[str | None] | None, shares: Shares | None) -> None:
    wanted = shares.percent if shares else (0, 0, 0)
    known = None if groups is None else [(group, split) for group, split in zip(groups, splits) if group is not None]
    for split, percent in zip(SPLITS, wanted):
        if percent and split not in splits:
            many = len(splits) if known is None else len(splits) - len(known) + len({group for group, _ in known})
            logger.warning("nothing fell into %s (%d%%): %d names are few; give it more", split, percent, many)
    if known is None:
        return
    if len(known) < len(splits):
        logger.warning("%d of %d records have no group: each stands alone", len(splits) - len(known), len(splits))
    sides: dict[str, set[str]] = {}
    for group, split in known:
        sides.setdefault(group, set()).add(split)
    torn = [group for group, those in sides.items() if len(those) > 1]
    if torn:
        logger.warning("%d groups stand in several splits, as %s; --split keeps each in one", len(torn), torn[0])


def split_of_place(index: int, count: int) -> str:
    """The split of a drawn picture: the first 80% are train, the next 10% valid, the rest test."""
    return "train" if index < count * 8 // 10 else "valid" if index < count * 9 // 10 else "test"
