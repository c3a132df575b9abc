"""docs/data.md: every command in it is run, in order, on tiny inputs of the names it uses."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from launch import cli
from pipeline.data.shards import ShardSet
from tests.commands import ROOT
from tests.pipeline.data.test_datasets import write_daynight, write_domains, write_mnist, write_table, write_wds
from tests.pipeline.planted import write_celeba
from tests.warm import forked

PAGE = ROOT / "docs/data.md"


def steps(text: str) -> list[str]:
    """Commands of the fenced blocks, each with its here-document if it has one."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [step for block in blocks for step in re.findall(r"^(cat > .*?\nEND|[^\n]+)$", block, re.S | re.M) if step]


def make_inputs(folder: Path) -> None:
    rows = (PAGE.read_text().split("    path,")[1]).split("\n\n")[0].replace("\n    ", "\n").splitlines()
    lines = ["path," + rows[0]]
    (folder / "photos").mkdir()
    for n in range(160):
        pixels = np.random.default_rng(n).integers(0, 256, (5, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((40 + n % 9, 48)).save(folder / f"photos/{n:04d}.jpg")
        _, *cells = rows[1 + n % (len(rows) - 1)].split(",")
        lines.append(",".join([f"photos/{n:04d}.jpg", f"person{n % 40}", *cells[1:]]))
    (folder / "list.csv").write_text("\n".join(lines))
    write_domains(folder / "apple2orange")
    for n in range(60):
        (folder / "flowers" / ("rose", "lily", "iris")[n % 3]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), n).save(folder / "flowers" / ("rose", "lily", "iris")[n % 3] / f"{n}.png")
    write_mnist(folder / "mnist")
    write_daynight(folder / "webcams", cameras=30)
    write_wds(folder / "tars")
    write_table(folder / "made", parquet=True).rename(folder / "people.parquet")
    (folder / "made/p").rename(folder / "p")
    write_celeba(folder / "celeba", 30)
    with zipfile.ZipFile(folder / "webcams.zip", "w") as archive:
        for path in sorted((folder / "webcams").rglob("*")):
            archive.write(path, path.relative_to(folder / "webcams"))


def run(folder: Path, words: list[str]) -> None:
    """The command line in this process, for the sake of time; it must end with exit code 0."""
    with contextlib.chdir(folder), patch.object(sys, "argv", words), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, f"{shlex.join(words)} ended with {end.value.code}"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder in which all of the page was run, and what was run."""
    folder, ran = tmp_path_factory.mktemp("page"), []
    make_inputs(folder)
    for step in steps(PAGE.read_text()):
        if step.startswith("cat > "):
            first, *lines = step.splitlines()
            (folder / first.split()[2]).write_text("\n".join(lines[:-1]) + "\n")
            continue
        program, command, *words = shlex.split(step)
        assert program == "fader", f"the page runs {step!r}, which this test cannot"
        one = ["--workers", "1"] if command == "prepare" and words[0] != "upload" else []
        if command == "train":
            forked("launch.train", *words, "tracking.enabled=false", cwd=folder)
        else:
            run(folder, [program, command, *words, *one])
        ran.append(step)
    return folder, ran


def test_every_command_of_the_page_runs(done):
    folder, ran = done
    assert len(ran) >= 14
    for name in sorted(path.name for path in (folder / "data").iterdir()):
        assert len(ShardSet.open(folder / "data" / name).split("train")) > 0, name
    assert (folder / "runs/mine/checkpoints/images-000000000064/networks.safetensors").is_file()
    assert ShardSet.open(folder / "data/fruit").attributes.names == ("orange",)


def test_the_page_names_every_set_and_every_crop():
    from pipeline.data.datasets import DATASETS
    from pipeline.images import CROPS

    text = PAGE.read_text()
    for name in [*DATASETS, *CROPS]:
        assert f"| `{name}` |" in text, name
