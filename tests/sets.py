"""A small drawn set, made once a test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import launch

COUNT = 120


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A shard set of drawn faces."""
    folder = tmp_path_factory.mktemp("faces") / "set"
    launch("launch.prepare", "faces", folder, "--count", str(COUNT))
    return folder
