"""Fixtures that several folders share, and the reason for which GPU tests are skipped."""

from __future__ import annotations

import pytest
import torch

from tests.sets import faces  # noqa: F401


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA; `make gpu` runs it where there is some"))
