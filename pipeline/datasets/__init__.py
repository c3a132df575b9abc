"""Data sets: each a function that reads a source and gives a Dataset, the light index that shards are written from."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.datasets.celeba import read_celeba
from pipeline.datasets.faces import read_faces
from pipeline.datasets.record import SPLITS, Dataset, LeftOut, Record

DATASETS: dict[str, Callable[..., Dataset]] = {"celeba": read_celeba, "faces": read_faces}

__all__ = ["DATASETS", "SPLITS", "Dataset", "LeftOut", "Record"]
