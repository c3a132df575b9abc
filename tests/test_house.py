"""The house's rules, read off the source: launch → pipeline → fader → torch, one home a library, no utils.py, limits of size."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fader", "pipeline", "launch")
FLOOR = ("files", "ownership", "images", "metrics", "settings", "config")  # files of pipeline that stand in no wing, in order
WINGS = ("data", "loading", "engine", "tracking", "models", "evaluation", "training", "faces", "app")  # one way along this line
HOMES = {
    "accelerate": {"engine"},
    "deepspeed": {"engine"},
    "nvidia": {"loading.dali"},
    "mlflow": {"tracking", "models"},
    "webdataset": {"data", "loading.pillow"},
    "pyarrow": {"data"},
    "fsspec": {"data"},
    "sklearn": {"data.datasets"},
    "yaml": {"config"},
    "fastapi": {"app"},
    "uvicorn": {"app"},
    "onnx": {"models.onnx"},
    "onnxruntime": {"models.onnx"},
    "cv2": {"faces.alignment"},
}
FILE, CLASS, FUNCTION, LINE = 400, 250, 60, 130  # lines, lines, lines without the docstring, characters
WHOLE = 24_000  # lines of Python in FOLDERS together
TOO_BIG: set[str] = set()  # what is above its limit today; this list only shrinks


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


def stands_below(place: str, name: str) -> bool:
    """Whether what is called `name` in pipeline stands below `place`: the ground floor first, then wing after wing."""
    order = (*FLOOR, *WINGS)
    assert place in order, f"pipeline/{place} is no wing and no file of the ground floor: give it a place in this test"
    return name not in order or order.index(name) > order.index(place)


def circles(edges: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Each circle of files that import one another, as sorted names, by Tarjan's strongly connected components."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in edges.get(name, ()):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            members = [stack.pop()]
            while members[-1] != name:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(tuple(sorted(members)))

    for name in edges:
        if name not in number:
            visit(name)
    return found


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Which file imports which, by dotted names; what a package's `__init__` gives on counts as the package itself."""
    files = {".".join(path.relative_to(root).with_suffix("").parts) for path in sources(root)}
    edges: dict[str, set[str]] = {}
    for path in sources(root):
        names = [name for _, name in imports(path)]
        ends = {name if name in files else name.rpartition(".")[0] for name in names}
        edges[".".join(path.relative_to(root).with_suffix("").parts)] = ends & files
    return edges


def broken(path: Path, text_root: Path = ROOT) -> list[str]:
    """Every line of a file that breaks a rule, in words."""
    parts = path.relative_to(text_root).with_suffix("").parts
    folder = parts[0]
    wrong = []
    for line, name in imports(path):
        top, *rest = name.split(".")
        where = f"{path.relative_to(text_root)}:{line}"
        if top == "tests" or (top in FOLDERS and FOLDERS.index(top) > FOLDERS.index(folder)):
            wrong.append(f"{where}: {folder} imports {name}; the way is launch -> pipeline -> fader")
        if folder == "fader" and top not in ("fader", "torch") and top not in sys.stdlib_module_names:
            wrong.append(f"{where}: fader imports {name}; it takes torch and the standard library only")
        if folder == "pipeline" and top == "pipeline" and rest and rest[0] != parts[1] and stands_below(parts[1], rest[0]):
            wrong.append(f"{where}: pipeline.{parts[1]} imports {name}, which stands below it")
        if top in HOMES and not (folder == "pipeline" and HOMES[top] & {".".join(parts[1 : n + 1]) for n in (1, 2)}):
            wrong.append(f"{where}: {top} has its home in {', '.join(sorted(HOMES[top]))}")
    return wrong


def sources(root: Path = ROOT) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_goes_one_way(path):
    assert not broken(path), "\n".join(broken(path))


def test_no_files_import_one_another():
    assert not circles(graph())


def test_the_rule_sees_what_it_is_for(tmp_path):
    """Each forbidden import, planted, is found."""
    plants = {
        "fader/a.py": "import numpy",
        "fader/b.py": "from pipeline.config import load",
        "pipeline/data/shards.py": "from pipeline.training.run import train",
        "pipeline/config.py": "from pipeline.data.shards import ShardSet",
        "pipeline/images.py": "import launch.cli",
        "pipeline/metrics.py": "import mlflow",
        "launch/c.py": "def f():\n    from accelerate import Accelerator",
    }
    for name, text in plants.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        assert broken(path, tmp_path), f"{name}: {text!r} went unseen"
    (tmp_path / "pipeline/b.py").write_text("def f():\n    from pipeline.c import g")
    (tmp_path / "pipeline/c.py").write_text("import pipeline.b")
    assert circles(graph(tmp_path)) == [("pipeline.b", "pipeline.c")]


def test_there_is_no_utils():
    assert not [path for path in sources() if path.stem in ("utils", "helpers", "misc", "common")]


def definitions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield each class and function of a file with its dotted name, at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield outer + node.name, node
            yield from definitions(node, f"{outer}{node.name}.")
        else:
            yield from definitions(node, outer)


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from `class` or `def` to the last one; the docstring of a function does not count."""
    lines = node.end_lineno - node.lineno + 1
    if not isinstance(node, ast.ClassDef) and ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def oversized(path: Path, root: Path = ROOT) -> dict[str, str]:
    """Return what of a file is above its limit: a name, and the size in words."""
    name, text = str(path.relative_to(root)), path.read_text(encoding="utf-8")
    lines = text.splitlines()
    long = [str(number) for number, line in enumerate(lines, 1) if len(line) > LINE]
    sizes = {f"{name} long lines": f"above {LINE} characters: {', '.join(long)}"} if long else {}
    if path.suffix == ".py":
        if len(lines) > FILE:
            sizes[name] = f"{len(lines)} lines, limit {FILE}"
        for inner, node in definitions(ast.parse(text)):
            limit = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
            if length(node) > limit:
                sizes[f"{name}::{inner}"] = f"{length(node)} lines, limit {limit}"
    return sizes


def code() -> list[Path]:
    """Return every file that is code: Python, configs, what launchers and Slurm read, and how all of it is built."""
    kinds = (".py", ".yaml", ".json", ".sbatch")
    files = [path for folder in (*FOLDERS, "configs") for path in sorted((ROOT / folder).rglob("*")) if path.suffix in kinds]
    return [*files, *(ROOT / name for name in ("Makefile", ".ci/run", "setup.cfg", "pyproject.toml"))]


def test_no_file_class_function_or_line_is_too_big():
    sizes = {name: size for path in code() for name, size in oversized(path).items()}
    new = [f"{name}: {size}" for name, size in sizes.items() if name not in TOO_BIG]
    assert not new, "too big; cut it:\n" + "\n".join(new)
    gone = sorted(TOO_BIG - sizes.keys())
    assert not gone, f"within its limit now; take it out of TOO_BIG: {gone}"


def test_the_whole_code_is_within_its_limit():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in code() if path.suffix == ".py")
    assert lines <= WHOLE, f"{lines} lines of Python without tests, limit {WHOLE}"


@pytest.mark.parametrize(
    ("head", "line", "times", "name"),
    [
        ("", "x = 1\n", FILE, "a.py"),
        ("class A:\n", "    x = 1\n", CLASS - 1, "a.py::A"),
        ("class A:\n    def f(self):\n", "        x = 1\n", FUNCTION - 1, "a.py::A.f"),
        ("if 1:\n    async def f():\n", "        x = 1\n", FUNCTION - 1, "a.py::f"),
        ('def f():\n    """One.\n\n    Two.\n    """\n', "    x = 1\n", FUNCTION - 1, "a.py::f"),
        ("#", "é", LINE - 1, "a.py long lines"),
    ],
)
def test_each_limit_of_size_is_held(tmp_path, head, line, times, name):
    """What is as big as its limit passes, and one line or character more is seen."""
    path = tmp_path / "a.py"
    path.write_text(head + line * times, encoding="utf-8")
    assert not oversized(path, tmp_path)
    path.write_text(head + line * (times + 1), encoding="utf-8")
    assert oversized(path, tmp_path).keys() == {name}
