"""docs/using.md: its commands are run in order, with a method that paints what its sliders say for the model."""

from __future__ import annotations

import contextlib
import json
import re
import shlex

import pytest
from PIL import Image

from pipeline.data.datasets.faces import draw_face
from pipeline.data.shards import ShardSet
from tests.commands import ROOT
from tests.runs import make_run, make_store, painter
from tests.warm import forked

PAGE = ROOT / "docs/using.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, faces):
    """The run of the page, its two judges, a photo with a face in it, and a store."""
    folder = tmp_path_factory.mktemp("using")
    data = {"path": str(faces), "attributes": ["Smiling", "Eyeglasses", "Beard"]}
    with painter() as method:
        judges = [str(folder / "runs" / name) for name in ("judge", "other")]
        for name, keys in (("judge", {"seed": 7001}), ("other", {"seed": 7002}), ("celeba_fader", {"judge": judges})):
            made = {"name": "sham_other_painter"} if name == "other" else method
            make_run(folder / "runs" / name, made, data=data, attributes=ShardSet.open(faces).attributes, **keys)
    photo = Image.new("RGB", (700, 600), (120, 130, 140))
    photo.paste(draw_face(0, 0).resize((356, 436), Image.Resampling.LANCZOS), (200, 90))
    photo.save(folder / "photo.jpg", quality=95)
    make_store(folder)
    return folder


def test_every_command_does_what_the_page_says(folder):
    for block in blocks("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "fader"
            forked("tests.with_shams", *words[1:], cwd=folder, MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db")
    made = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.png")}
    assert {"edited/photo.png", "edited/grid.png", "whole/photo-pasted.png", "steps/sweep-Smiling.png"} <= made
    assert {"swaps/swaps.png", "grid/photo-Smiling-Eyeglasses.png"} <= made and (folder / "moving/photo-Smiling.webp").is_file()
    assert Image.open(folder / "whole/photo-pasted.png").size == (700, 600)
    from mlflow import MlflowClient

    aliases = MlflowClient(f"sqlite:///{folder}/mlflow.db").get_registered_model("faces").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"challenger": 2, "champion": 1}


def test_the_lines_of_python_run(folder, monkeypatch):
    [code] = blocks("python")
    monkeypatch.chdir(folder)
    with painter(), contextlib.closing(Image.open("photo.jpg")) as image:
        exec(code, {"image": image})
    assert Image.open("smile.png").size == (32, 32)


def test_the_cells_of_the_notebook_run(folder, monkeypatch):
    cells = json.loads((ROOT / "docs/sliders.ipynb").read_text())["cells"]
    monkeypatch.chdir(folder)
    names: dict = {}
    with painter():
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert names["row"].size == (5 * 32, 32) and names["edited"].shape == (1, 3, 32, 32)
    assert [names["row"].getpixel((32 * step + 9, 9))[0] for step in range(5)] == [0, 64, 128, 191, 255]
