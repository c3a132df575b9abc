"""Fixtures that several folders share, the reason for which GPU tests are skipped, what tests on several ranks took."""

from __future__ import annotations

import pytest
import torch

from tests.second_device import other_device  # noqa: F401
from tests.sets import faces  # noqa: F401


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("ranks") is not None)  # last: beside them Slurm's would take time
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA; `make gpu` runs it where there is some"))


def pytest_terminal_summary(terminalreporter):
    """One line: the seconds of all tests that start several ranks, for which there is a limit (setup.cfg)."""
    listed = [entry for kind in terminalreporter.stats.values() for entry in kind]  # tests left out are items, no reports
    seconds = [entry.duration for entry in listed if isinstance(entry, pytest.TestReport) and "ranks" in entry.keywords]
    if seconds:
        terminalreporter.write_line(f"tests on several ranks: {sum(seconds):.0f} s")
