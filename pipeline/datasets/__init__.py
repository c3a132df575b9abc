"""Data sets: each a function that reads a source and gives a Dataset, the light index that shards are written from."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.datasets.celeba import read_celeba
from pipeline.datasets.record import SPLITS, Dataset, LeftOut, Record


__all__ = ["DATASETS", "SPLITS", "Dataset", "LeftOut", "Record"]
