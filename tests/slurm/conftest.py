"""The cluster of these tests: one for all of them. Without Slurm they are skipped, or fail where REQUIRE_SLURM is set."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm of four nodes on this machine; the queue must be empty when the last test is done."""
    absent = missing()
    if absent:
        reason = f"needs Slurm and munge ({', '.join(absent)} not found): apt-get install slurm-wlm munge"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder, nodes=4) as running:
            yield running
            assert not running.queue(), f"jobs are left: {running.queue()}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
