"""The index of a set while a reader fills it, record by record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.data.datasets.columns import is_unknown, plain
from pipeline.data.datasets.record import Dataset, LeftOut, key_fault
from pipeline.data.datasets.splits import NAMES, Shares, assign


class Index:
    """One entry a record in each list; the first fault raises, or with `skip_bad` all of them are collected. grouped:
    records of one group stand in one split; a record whose group is unknown stands alone."""

    def __init__(self, skip_bad: bool, grouped: bool = False) -> None:
        self.skip_bad, self.grouped = skip_bad, grouped
        self.keys: list[str] = []
        self.locations: list[str] = []
        self.places: list[str] = []
        self.left_out: list[LeftOut] = []
        self._splits: list[str | None] = []
        self._groups: list[str | None] = []

    def fault(self, key: str | None, place: str, reason: str) -> None:
        """Leave out what is wrong at this place, or raise ValueError. key: None when it belongs to no record."""
        if not self.skip_bad:
            raise ValueError(f"{place}: {reason}; mend the file, or leave such records out with --skip-bad")
        self.left_out.append(LeftOut(key, f"{place}: {reason}"))

    def add(self, key: str, location: str, place: str, split: str | None = None, group: str = "") -> bool:
        """Take one record, unless it is wrong. split: as the set calls it, None when the set gives none."""
        given = None if split is None else NAMES.get(plain(split).lower())
        reason = key_fault(key)
        if reason is None and split is not None and given is None:
            reason = f"split is {split!r}; train, valid or test is needed"
        if reason:
            self.fault(key, place, reason)
            return False
        self.keys.append(key)
        self.locations.append(location)
        self.places.append(place)
        self._splits.append(given)
        self._groups.append(plain(group) if group and not is_unknown(group) else None)
        return True

    def dataset(
        self, name: str, source: dict[str, Any], attribute_list: list[dict[str, Any]], labels: Sequence[Any] | np.ndarray,
        read: Callable[[str], bytes], shares: Shares | None = None, bad: Mapping[int, str] | None = None,
    ) -> Dataset:
        """Return the set, without records whose key an earlier record has. labels: [N, A] of the records that were taken,
        of one attribute also [N]. bad: what else is wrong, by the number of the record."""
        bad, first = dict(bad or {}), dict[str, int]()
        for row, key in enumerate(self.keys if len({*self.keys}) < len(self.keys) else ()):
            if row not in bad and first.setdefault(key, row) != row:
                bad[row] = f"{key!r} stands at {self.places[first[key]]} already"
        for row in sorted(bad):
            self.fault(self.keys[row], self.places[row], bad[row])
        columns = [self.keys, self.locations, self.places, self._splits, self._groups]
        labels = np.asarray(labels, np.float32).reshape(len(self.keys), len(attribute_list))
        if bad:
            rows = [row for row in range(len(self.keys)) if row not in bad]
            columns, labels = [[column[row] for row in rows] for column in columns], labels[rows]
        keys, locations, places, given, groups = columns
        splits, how = assign(
            keys, given=None if None in given else given, groups=groups if self.grouped else None, shares=shares
        )
        return Dataset(
            name=name, source={**source, "split": how}, attribute_list=attribute_list, keys=keys, splits=splits,
            locations=locations, labels=labels, places=places, read=read, left_out=self.left_out,
        )
