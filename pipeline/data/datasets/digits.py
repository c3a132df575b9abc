"""scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels: real input that comes with a package.

Source: Alpaydin, Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
"""

from functools import lru_cache

import numpy as np

from pipeline.data.datasets.index import Index
from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.splits import Shares
from pipeline.images import png_bytes


def read_digits(*, shares: Shares | None = None, skip_bad: bool = False) -> Dataset:
    """The index of the set, which gives no splits: 80/10/10 by default. Raises ValueError: scikit-learn is not installed."""
    pictures, labels = _digits()
    index = Index(skip_bad)
    for number in range(len(pictures)):
        index.add(f"{number:04d}", f"{number:04d}", f"digits record {number}")
    entry = {"name": "digit", "kind": "k-way", "categories": [str(value) for value in range(10)]}
    return index.dataset("digits", {"package": "scikit-learn"}, [entry], labels, read_digit, shares)


def read_digit(location: str) -> bytes:
    return png_bytes(_digits()[0][int(location)])


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 8, 8] uint8, the levels 0 to 16 spread over 0 to 255, and labels [n]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'attribute-sliders[digits]'") from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target
