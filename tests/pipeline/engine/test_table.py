"""README.md beside this file: its tests exist, those marked (CUDA) are run by `make gpu`, and no launch file is left out."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.gpu import CELLS

PAGE = Path(__file__).with_name("README.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`( \(CUDA\))?", PAGE)


@cache
def functions(path: Path) -> dict[str, str]:
    """Every function of a file, with the text of its decorators."""
    tree = ast.parse(path.read_text())
    return {
        node.name: " ".join(map(ast.unparse, node.decorator_list))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(("file", "name", "cuda"), sorted(set(NAMED)), ids=lambda value: value.strip() or "cpu")
def test_a_named_test_exists_and_runs_where_the_page_says(file, name, cuda):
    found = functions(ROOT / file)
    assert name in found, f"{file} has no {name}"
    on_cuda = name in CELLS if file == "tests/gpu.py" else "pytest.mark.gpu" in found[name]
    assert on_cuda == bool(cuda), f"{name} {'needs' if on_cuda else 'does not need'} CUDA"


def test_every_row_names_a_test_and_every_launch_file_has_a_row():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| started by")]
    assert len(rows) >= 18 and all(re.search(r"`tests/\S+::\w+`", row) for row in rows)
    started_by = " ".join(row.split("|")[1] for row in rows)
    users = (ROOT / "docs/distributed.md").read_text()
    for path in (ROOT / "launch/accelerate").glob("*.yaml"):
        assert f"`{path.name}`" in started_by, f"{path.name} is started by no test of the page"
        assert f"`{path.name}`" in users, f"docs/distributed.md does not name {path.name}"


def test_only_fp16_nccl_and_gpu_decode_are_left_to_cuda():
    cells = [row.split("|")[2:4] for row in PAGE.splitlines() if "(CUDA)" in row and row.startswith("| ")]
    assert cells and all("fp16" in precision or "NCCL" in back_end for back_end, precision in cells)
