"""`fader demo`: the whole way in minutes, by the commands a user would type, on faces it draws itself."""

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.command import main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MARKER = "made-by-fader-demo"
NAME = "faces-fader"
ASKED_FOR = ("Smiling", "Wearing_Hat", "Blond_Hair")
ASKED_OF_SWAPS, ASKED_OF_JUDGES = 0.80, 0.95  # at least: accuracies by the lowest of four readers
ASKED_OF_TWINS = 0.6  # at most, in each direction: the error against the twin, over that of doing nothing


def demo(
    out: Annotated[Path, typer.Option(help="folder of everything the demo makes; one it made before is replaced")] = Path("demo"),
    count: Annotated[int, typer.Option(help="faces to draw", min=200)] = 4000,
    images: Annotated[int | None, typer.Option(help="train on so many images instead of what the configs say", min=1)] = None,
) -> None:
    """Draw labelled faces, shard them, train two judges and a Fader network, evaluate, register, and move the sliders.

    Exits with 1 unless Smiling, Wearing_Hat and Blond_Hair each reach a balanced swap accuracy of 0.80 by the lowest of four
    readers, each of which is right on 95% of real drawn faces, and in each direction remove 40% of the error against the
    same face drawn with the attribute changed.
    """
    if not CONFIGS.is_dir():
        raise ValueError(f"the demo reads its experiments from {CONFIGS}, which is not there: run it in a checkout")
    _claim(out)
    began = time.monotonic()
    faces, run, report = out / "faces", out / "fader", out / "report.json"
    judges = {"faces_residual_judge": out / "residual_judge", "faces_judge": out / "judge"}
    length = [f"method.images={images}"] if images else []
    _fader("prepare", "faces", faces, "--count", count, "--twins")
    for name, folder in judges.items():
        _fader("train", CONFIGS / f"{name}.yaml", f"data.path={faces}", f"run.folder={folder}", *length)
    panel = ",".join(map(str, judges.values()))
    _fader("train", CONFIGS / "faces_fader.yaml", f"data.path={faces}", f"run.folder={run}", f"judge={panel}", *length)
    _fader("evaluate", run, "--json", report)
    _fader("register", run, "--name", NAME)
    model = f"models:/{NAME}@challenger"
    photos = _photos(faces)
    _fader("edit", *photos, "--model", model, "--sweep", "Smiling=-2:2:9", "--out", out / "sweep")
    _fader("edit", *photos, "--model", model, "--sweep", "Wearing_Hat=-1.5:1.5:7", "--out", out / "sweep")

    passed, lines = _verdict(json.loads(report.read_text()))
    typer.echo("\n" + "\n".join(lines))
    typer.echo(f"\nthe whole way took {time.monotonic() - began:.0f} s; pictures: {out / 'sweep' / 'sweep-Smiling.png'}")
    typer.echo(next_commands(photos[0], model, out))
    if not passed:
        typer.echo("error: the demo did not reach what it is asked for (see the table above)", err=True)
        raise typer.Exit(1)


def _claim(out: Path) -> None:
    """An empty folder with our mark: what an earlier demo made goes, anything else stays and is an error."""
    if out.exists():
        if not (out / MARKER).exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds files that no demo made; name another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def _fader(*words: object) -> None:
    """Run one command as a user would, showing it; its failure ends the demo with its exit code."""
    line = [str(word) for word in words]
    typer.echo(f"\n$ fader {shlex.join(line)}")
    done = subprocess.run([sys.executable, "-m", "launch.cli", *line])
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def _photos(faces: Path) -> list[Path]:
    """Six drawn faces of the test split, which nothing was trained on, as photos of one's own."""
    from pipeline.data.shards import ShardSet

    keys = ShardSet.open(faces).split("test").keys[:6]
    return [next((faces / "source").rglob(f"{key}.jpg")) for key in keys]


def _verdict(report: Mapping[str, Any]) -> tuple[bool, list[str]]:
    numbers = report["metrics"]
    rows = [f"{'':<14}{'real faces':>11}{'swaps':>8}{'to present':>12}{'to absent':>11}"]
    passed = True
    for name in dict.fromkeys([*(truth["attribute"] for truth in report["truth"]), *ASKED_FOR]):
        names = (f"judge_accuracy.{name}", f"swap_accuracy.{name}", f"twin_inside.{name}_0_to_1", f"twin_inside.{name}_1_to_0")
        judged, swapped, *twins = cells = [numbers.get(f"test/{number}", math.nan) for number in names]
        widths = zip(cells, (11, 8, 12, 11))
        row = f"{name:<14}" + "".join(f"{'–' if math.isnan(cell) else f'{cell:.3f}':>{width}}" for cell, width in widths)
        if name in ASKED_FOR:
            good = judged >= ASKED_OF_JUDGES and swapped >= ASKED_OF_SWAPS and all(twin < ASKED_OF_TWINS for twin in twins)
            passed &= good
            row += "" if good else "  <- short"
        rows.append(row)
    rows += [
        "real faces, swaps: balanced accuracy by the lowest of four readers. to present, to absent: the error of swaps where",
        "something should change, against the same face drawn with it changed: 0 is that face, 1 is nothing done. Asked of",
        f"{', '.join(ASKED_FOR)}: {ASKED_OF_JUDGES:.2f}, {ASKED_OF_SWAPS:.2f}, below {ASKED_OF_TWINS} both ways.",
        f"reconstruction: mean squared error {numbers['test/mse']:.4f} on [-1, 1], PSNR {numbers['test/psnr']:.1f} dB",
    ]
    return passed, rows


def next_commands(photo: Path, model: str, out: Path) -> str:
    return "\n".join(
        [
            "next:",
            f"  fader edit {photo} --model {model} --set Smiling=1.5 Beard=beard --out {out / 'edited'}",
            f"  fader app --model {model}   # the sliders in your browser, at http://127.0.0.1:7860",
            "  mlflow ui --port 5000            # the runs and the registered model, at http://127.0.0.1:5000",
            "  fader prepare celeba FOLDER_WITH_THE_OFFICIAL_FILES data/celeba",
            "  fader train configs/celeba_judge.yaml && fader train configs/celeba_residual_judge.yaml",
            "  fader train configs/celeba_fader.yaml",
        ]
    )


if __name__ == "__main__":
    main(demo)
