"""`fader align PHOTO… OUT`: faces cut out of photos as CelebA's are; `--measure SHARDS`: how well that works."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.command import describe, main, say_next

if TYPE_CHECKING:
    from pipeline.faces.alignment import Face
    from pipeline.faces.cutting import Cutter
    from pipeline.faces.misalignment import Errors

_EVERY = 50


def align(
    paths: Annotated[list[Path] | None, typer.Argument(help="pictures or folders, then where to", metavar="PHOTO... OUT")] = None,
    model: Annotated[str | None, typer.Option(help="an aligner that refines: run, export or models:/NAME@alias")] = None,
    every_face: Annotated[bool, typer.Option("--all", help="every face of a photo, not the largest alone")] = False,
    format_: Annotated[Literal["png", "jpg"], typer.Option("--format", help="of the pictures it writes")] = "png",
    overwrite: Annotated[bool, typer.Option(help="replace pictures that are in OUT already")] = False,
    measure: Annotated[Path | None, typer.Option(help="instead: how far off planted faces are found", metavar="SHARDS")] = None,
    split: Annotated[str, typer.Option(help="of the shard set that is measured on")] = "test",
    count: Annotated[int, typer.Option(help="records that are measured on", min=1)] = 1_000,
) -> None:
    """Find faces, and turn, scale and cut them to CelebA's geometry: 178x218, eyes near (69, 111) and (108, 111)."""
    paths = paths or []
    if measure is not None:
        if paths:
            raise ValueError(f"--measure takes its pictures from {measure}; {paths[0]} cannot be given too")
        _measure(measure, split, count, model)
        return
    if len(paths) < 2:
        raise ValueError("name photos and, last, the folder to write: fader align PHOTO... OUT")
    *given, out = paths
    from pipeline.faces.alignment import load_aligner
    from pipeline.faces.cutting import Cutter
    from pipeline.faces.photos import listed

    photos = listed(given)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the last word is the folder to write")
    _cut(photos, Cutter(out, format_, load_aligner(model), every_face, overwrite))


def _cut(photos: list[Path], cutter: "Cutter") -> None:
    from pipeline.faces.cutting import SHEET_PAIRS

    missed, count, first = 0, 0, None
    for cut in cutter.cut(photos):
        if cut.error:
            missed += 1
            typer.echo(f"left out {cut.photo}: {describe(cut.error)}", err=True)
        for number, (face, file) in enumerate(zip(cut.faces, cut.files)):
            typer.echo(f"wrote {file}: {_about(face, number, len(cut.faces), cutter.every_face)}")
            count, first = count + 1, first or file
    if cutter.write_sheet():
        shown = f" (the first {SHEET_PAIRS})" if count > SHEET_PAIRS else ""
        typer.echo(f"wrote {cutter.sheet}: photo and crop side by side{shown}")
    if missed:
        raise ValueError(f"{missed} of {len(photos)} photos left out, as said above")
    say_next("edit", first, "--model", "MODEL", "--set", "Smiling=1.5", "--out", "edited")


def _about(face: "Face", number: int, faces: int, every_face: bool) -> str:
    left, right = face.eyes
    words = f"eyes at ({left.real:.0f}, {left.imag:.0f}) and ({right.real:.0f}, {right.imag:.0f})"
    if faces > 1:
        words += f", face {number + 1} of {faces} by size" if every_face else f", the largest of {faces} faces"
    if face.size > 1:
        words += f", {face.size:.1f} photo pixels a pixel"
    else:
        words += f", enlarged {1 / face.size:.1f} times"
    return words + ("" if face.sure else "; hardly seen: look at it")


def _measure(shards: Path, split: str, count: int, model: str | None) -> None:
    from pipeline.data.shards import ShardSet
    from pipeline.faces import misalignment
    from pipeline.faces.alignment import load_aligner

    aligner = load_aligner(model)
    records = ShardSet.open(shards).split(split)

    def watch(done: int) -> None:
        if done % _EVERY == 0:
            typer.echo(f"{done:>6,} / {min(count, len(records)):,}", err=True)

    turned = "turned by up to {:g} degrees, scaled by {:g} to {:g}".format(misalignment.MAX_TURN, *misalignment.ZOOMS)
    typer.echo(f"{min(count, len(records)):,} of the {len(records):,} {split} records of {shards}, each {turned} in a canvas")
    for line in _table(misalignment.measure(records, count, aligner, watch=watch)):
        typer.echo(line)
    if model is None:
        say_next("train", "configs/celeba_aligner.yaml")


def _table(rows: list["Errors"]) -> list[str]:
    from pipeline.faces.misalignment import RIGHT_WITHIN

    right = f"within {RIGHT_WITHIN:.1f} px"
    lines = [f"{'':<24} {'found':>8} {right:>14} {'median px':>10} {'90th percentile px':>19}"]
    for errors in rows:
        pixels = f"{errors.percentile(50):>10.2f} {errors.percentile(90):>19.2f}"
        lines.append(f"{errors.name:<24} {errors.found:>8.1%} {errors.right:>14.1%} {pixels}")
    return lines


if __name__ == "__main__":
    main(align)
