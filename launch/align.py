"""`fader align PHOTO… OUT`: faces cut out of photos as CelebA's are; `--measure SHARDS`: how well that works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.command import describe, main
from pipeline.files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from pipeline.faces.alignment import Face
    from pipeline.faces.misalignment import Errors
    from pipeline.models import Model

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SHEET_PAIRS = 24
_JPEG_QUALITY = 95
_EVERY = 50


def align(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="pictures or folders of them, then the folder to write", metavar="PHOTO... OUT"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="an aligner that refines: run, export or models:/NAME@alias")
    ] = None,
    every_face: Annotated[bool, typer.Option("--all", help="every face of a photo, not the largest alone")] = False,
    format_: Annotated[Literal["png", "jpg"], typer.Option("--format", help="of the pictures it writes")] = "png",
    overwrite: Annotated[bool, typer.Option(help="replace pictures that are in OUT already")] = False,
    measure: Annotated[
        Path | None,
        typer.Option(help="instead: plant faces of this set and say how far off they are found", metavar="SHARDS"),
    ] = None,
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
    photos = _photos(given)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the last word is the folder to write")
    _align(photos, out, _aligner(model), every_face, format_, overwrite)


# --- photos -----------------------------------------------------------------------------------------------------------


def _photos(given: list[Path]) -> list[Path]:
    """The pictures that were named, and those in folders that were named.

    Raises:
        ValueError: something is not there, or a folder holds no picture.
    """
    photos: list[Path] = []
    for path in given:
        if not path.exists():
            raise ValueError(f"{path}: there is no such photo or folder")
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICTURES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no picture ({', '.join(_PICTURES)})")
        photos += inside
    return photos


def _aligner(model: str | None) -> Model | None:
    if model is None:
        return None
    from pipeline import models
    from pipeline.faces import alignment

    aligner = models.load(model)
    alignment.check_aligner(aligner)
    return aligner


def _align(photos: list[Path], out: Path, aligner: Model | None, every_face: bool, kind: str, overwrite: bool) -> None:
    import numpy as np

    from pipeline.faces import alignment
    from pipeline.images import png_bytes

    names = _Names(out, kind)
    stems = [names.free(photo.stem) for photo in photos]
    if not overwrite:
        _refuse_existing([*(names.path(stem) for stem in stems), names.sheet])
    alignment.opencv()
    out.mkdir(parents=True, exist_ok=True)
    missed, pairs = 0, []
    for photo, stem in zip(photos, stems):
        try:
            pixels = _read(photo)
            faces = alignment.find(pixels, aligner)
            if not faces:
                raise ValueError(alignment.NO_FACE)
            wanted = faces if every_face else faces[:1]
            files = [names.path(stem), *(names.path(names.free(f"{stem}-face{k}")) for k in range(2, len(wanted) + 1))]
            if not overwrite:
                _refuse_existing(files)
        except (ValueError, OSError) as error:
            missed += 1
            typer.echo(f"left out {photo}: {describe(error)}", err=True)
            continue
        for number, (face, file) in enumerate(zip(wanted, files)):
            crop = alignment.crop(pixels, face.frame)
            write_whole(file, _bytes(crop, kind))
            pairs.append(np.hstack([alignment.thumbnail(pixels, face, crop.shape[0]), crop]))
            typer.echo(f"wrote {file}: {_about(face, number, len(faces), every_face)}")
    if pairs:
        write_whole(names.sheet, png_bytes(_sheet(pairs)))
        shown = f" (the first {_SHEET_PAIRS})" if len(pairs) > _SHEET_PAIRS else ""
        typer.echo(f"wrote {names.sheet}: photo and crop side by side{shown}")
    if missed:
        raise ValueError(f"{missed} of {len(photos)} photos left out, as said above")
    typer.echo(f"next: fader edit {names.path(stems[0])} --model MODEL --set Smiling=1.5 --out edited")


class _Names:
    """A file a face: STEM.png, and STEM-2.png for the second of a stem. sheet: the contact sheet."""

    def __init__(self, out: Path, kind: str) -> None:
        self.out, self.kind, self.sheet = out, kind, out / "sheet.png"
        self.taken = {self.sheet.stem}

    def free(self, stem: str) -> str:
        name, number = stem, 2
        while name in self.taken:
            name, number = f"{stem}-{number}", number + 1
        self.taken.add(name)
        return name

    def path(self, stem: str) -> Path:
        return self.out / f"{stem}.{self.kind}"


def _refuse_existing(files: list[Path]) -> None:
    for file in files:
        if file.exists():
            raise ValueError(f"{file} is there already; name another folder, or --overwrite to replace what is in it")


def _read(photo: Path) -> np.ndarray:
    import numpy as np

    from pipeline.images import decode

    return np.asarray(decode(photo.read_bytes()))


def _about(face: Face, number: int, found: int, every_face: bool) -> str:
    left, right = face.eyes
    words = f"eyes at ({left.real:.0f}, {left.imag:.0f}) and ({right.real:.0f}, {right.imag:.0f})"
    if found > 1:
        words += f", face {number + 1} of {found} by size" if every_face else f", the largest of {found} faces"
    if face.size > 1:
        words += f", {face.size:.1f} photo pixels a pixel"
    else:
        words += f", enlarged {1 / face.size:.1f} times"
    return words + ("" if face.sure else "; hardly seen: look at it")


def _bytes(crop: np.ndarray, kind: str) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    options = {"format": "PNG"} if kind == "png" else {"format": "JPEG", "quality": _JPEG_QUALITY}
    Image.fromarray(crop).save(buffer, **options)
    return buffer.getvalue()


def _sheet(pairs: list[np.ndarray]) -> np.ndarray:
    """Pairs of photo and crop, four across."""
    import numpy as np

    pairs = pairs[:_SHEET_PAIRS]
    across = min(4, len(pairs))
    pairs = pairs + [np.full_like(pairs[0], 255)] * (-len(pairs) % across)
    return np.vstack([np.hstack(pairs[i : i + across]) for i in range(0, len(pairs), across)])


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(shards: Path, split: str, count: int, model: str | None) -> None:
    from pipeline.data.shards import ShardSet
    from pipeline.faces import misalignment

    aligner = _aligner(model)
    records = ShardSet.open(shards).split(split)

    def watch(done: int) -> None:
        if done % _EVERY == 0:
            typer.echo(f"{done:>6,} / {min(count, len(records)):,}", err=True)

    typer.echo(
        f"{min(count, len(records)):,} of the {len(records):,} {split} records of {shards}, each turned by up to "
        f"{misalignment.MAX_TURN:g} degrees, scaled by {misalignment.ZOOMS[0]:g} to {misalignment.ZOOMS[1]:g} and "
        f"shifted in a canvas of {misalignment.CANVAS}x{misalignment.CANVAS}"
    )
    found = misalignment.measure(records, count, aligner, watch=watch)
    for line in _table(found):
        typer.echo(line)
    if model is None:
        typer.echo("next: fader train configs/celeba_aligner.yaml, then the same with --model runs/celeba_aligner")


def _table(found: list[Errors]) -> list[str]:
    from pipeline.faces.misalignment import RIGHT_WITHIN

    right = f"within {RIGHT_WITHIN:.1f} px"
    lines = [f"{'':<24} {'found':>8} {right:>14} {'median px':>10} {'90th percentile px':>19}"]
    for errors in found:
        pixels = f"{errors.percentile(50):>10.2f} {errors.percentile(90):>19.2f}"
        lines.append(f"{errors.name:<24} {errors.found:>8.1%} {errors.right:>14.1%} {pixels}")
    return lines


if __name__ == "__main__":
    main(align)
