"""An interpreter that does not see packages which are installed, as on a machine where they are not."""

from __future__ import annotations

from pathlib import Path

SITE = '''
import importlib.machinery
import importlib.metadata
import sys

HIDDEN = {names!r}


class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


def from_name(cls, name):
    if name.lower() in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
found = importlib.metadata.Distribution.from_name.__func__
importlib.metadata.Distribution.from_name = classmethod(from_name)
'''


def hide(folder: Path, *names: str) -> Path:
    """Write what hides modules and distributions of these names from every interpreter with `folder` first on PYTHONPATH."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(names=set(names)))
    return folder
