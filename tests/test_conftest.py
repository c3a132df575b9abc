"""What tests/conftest.py adds to a run of pytest."""

from __future__ import annotations

import pytest

from tests.commands import ROOT
from tests.warm import forked

TESTS = """
import pytest

@pytest.mark.ranks
def test_ranks(): pass

@pytest.mark.gpu
def test_gpu(): pass

def test_none(): pass
"""


@pytest.mark.parametrize(("words", "says"), [(("-m", "ranks"), True), (("-m", "gpu"), False)])
def test_the_time_of_ranks_is_said_also_where_tests_are_left_out(tmp_path, words, says):
    (tmp_path / "test_three.py").write_text(TESTS)
    done = forked("pytest", "-c", ROOT / "setup.cfg", "--rootdir", tmp_path, "-p", "tests.conftest", *words, tmp_path)
    assert ("tests on several ranks: 0 s" in done.stdout) == says, done.stdout
    assert "2 deselected" in done.stdout
