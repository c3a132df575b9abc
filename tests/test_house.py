"""The house's rules, read off the source: launch → pipeline → fader → torch, one home a library, no utils.py."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fader", "pipeline", "launch")
ORDER = (
    "images config augmentation datasets remote shards inspection quarantine balance batches steps cache tar_loader dali_loader "
    "throughput engine tracking metrics checkpoint registry alignment misalignment evaluation interruption watchdog validation train sweep app"
).split()
HOMES = {
    "accelerate": {"engine"},
    "deepspeed": {"engine"},
    "nvidia": {"dali_loader"},
    "mlflow": {"tracking", "registry"},
    "webdataset": {"shards", "tar_loader"},
    "pyarrow": {"shards", "datasets"},
    "fsspec": {"shards", "datasets"},
    "sklearn": {"datasets"},
    "yaml": {"config"},
    "gradio": {"app"},
    "cv2": {"alignment"},
}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a file, at any depth, `from a import b` as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the whole path"
            found += [(node.lineno, f"{node.module}.{name.name}") for name in node.names]
    return found


def broken(path: Path, text_root: Path = ROOT) -> list[str]:
    """Every line of a file that breaks a rule, in words."""
    parts = path.relative_to(text_root).with_suffix("").parts
    folder, place = parts[0], parts[1]
    wrong = []
    for line, name in imports(path):
        top, *rest = name.split(".")
        where = f"{path.relative_to(text_root)}:{line}"
        if top == "tests" or (top in FOLDERS and FOLDERS.index(top) > FOLDERS.index(folder)):
            wrong.append(f"{where}: {folder} imports {name}; the way is launch -> pipeline -> fader")
        if folder == "fader" and top not in ("fader", "torch") and top not in sys.stdlib_module_names:
            wrong.append(f"{where}: fader imports {name}; it takes torch and the standard library only")
        if folder == "pipeline" and top == "pipeline" and rest and rest[0] != place:
            if rest[0] not in ORDER or place not in ORDER or ORDER.index(rest[0]) > ORDER.index(place):
                wrong.append(f"{where}: pipeline.{place} imports {name}, which stands below it")
        if top in HOMES and not (folder == "pipeline" and place in HOMES[top]):
            wrong.append(f"{where}: {top} has its home in {', '.join(sorted(HOMES[top]))}")
    return wrong


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_goes_one_way(path):
    assert not broken(path), "\n".join(broken(path))


def test_the_rule_sees_what_it_is_for(tmp_path):
    """Each forbidden import, planted, is found."""
    plants = {
        "fader/a.py": "import numpy",
        "fader/b.py": "from pipeline.config import load",
        "pipeline/shards.py": "from pipeline.train import train",
        "pipeline/images.py": "import launch.cli",
        "pipeline/metrics.py": "import mlflow",
        "launch/c.py": "def f():\n    from accelerate import Accelerator",
    }
    for name, text in plants.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert broken(path, tmp_path), f"{name}: {text!r} went unseen"


def test_there_is_no_utils():
    assert not [path for path in sources() if path.stem in ("utils", "helpers", "misc", "common")]
