"""Records that do not decode while a run reads them: they are named and left out, and others are read in their place.

A record is replaced by the next one of the split, in the order of its rows, that does decode. This depends on which
records are damaged, and not on when or by which rank that was noticed. So a rank makes its share of a batch without asking
the others, and a resumed run makes the batches of the unbroken one.
"""

import logging
import threading
from collections.abc import Iterable

import numpy as np

from pipeline.data.shards import Split

logger = logging.getLogger(__name__)

_FEW = 3  # records that any share above 0 lets go


class Quarantine:
    """The records of a split that are left out. share: of the split that may be, though always a few unless it is 0; more
    is an error. keys: those known before, from a checkpoint; keys of other splits are passed over."""

    def __init__(self, split: Split, share: float, keys: Iterable[str] = ()) -> None:
        self.split = split
        self.most = min(max(_FEW, int(share * len(split))) if share else 0, len(split) - 1)
        known = sorted(set(keys))
        rows = np.flatnonzero(np.isin(split.keys, known)) if known else np.empty(0, np.int64)
        self._left_out = rows, self._next_readable(rows)  # set together: readers take no lock
        self._lock = threading.Lock()  # decoding threads report what they find

    @property
    def rows(self) -> np.ndarray:
        return self._left_out[0]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> list[str]:
        return [str(key) for key in self.split.keys[self.rows]]

    def add(self, row: int, reason: str) -> None:
        """Leave a record out from now on. Raises ValueError: there are more than may be left out."""
        with self._lock:
            if row in self.rows:
                return
            key, shard = self.split.keys[row], self.split.shards[self.split.shard[row]]
            self.check(len(self) + 1, f"; the last is {key} in {shard}: {reason}")
            rows = np.sort(np.append(self.rows, row))
            self._left_out = rows, self._next_readable(rows)
            next_key = self.split.keys[self.readable(np.array([row]))[0]]
            logger.warning(
                "%s: %s in %s does not decode: %s; it is left out from now on, %s stands in for it",
                self.split.name, key, shard, reason, next_key,
            )

    def check(self, count: int, last: str = "") -> None:
        """Raise a ValueError when so many records are more than may be left out."""
        if count > self.most:
            folder = self.split.shards[0].parent
            raise ValueError(
                f"{count:,} of {len(self.split):,} records of {self.split.name} do not decode, and data.quarantine_share "
                f"lets {self.most:,} go{last}; run 'fader verify {folder}' to see what is damaged, then 'fader prepare' again"
            )

    def count(self, keys: Iterable[str]) -> int:
        """How many of these keys are records of the split."""
        known = sorted(set(keys))
        return int(np.isin(self.split.keys, known).sum()) if known else 0

    def readable(self, rows: np.ndarray) -> np.ndarray:
        bad, stand_ins = self._left_out
        if not len(bad) or not len(rows):
            return rows
        place = np.minimum(np.searchsorted(bad, rows), len(bad) - 1)
        return np.where(bad[place] == rows, stand_ins[place], rows)

    def _next_readable(self, rows: np.ndarray) -> np.ndarray:
        """For each of these sorted rows the next row that is none of them; after the last row comes the first."""
        out, bad = np.empty_like(rows), set(rows.tolist())
        for n, row in enumerate(rows.tolist()):
            while row in bad:
                row = (row + 1) % len(self.split)
            out[n] = row
        return out
