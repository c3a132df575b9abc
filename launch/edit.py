"""`fader edit PHOTO… --model MODEL --set Smiling=1.5 --out DIR`: move the sliders on photos, or sweep one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from launch.command import main
from pipeline.files import replacing

if TYPE_CHECKING:
    import torch

    from pipeline.models import Editing, Model, Slider

_SEVERAL = ("--set", "--sweep", "--attributes")
_MAX_STEPS = 101
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class SeveralValues(TyperCommand):
    """Lets `--set A=1 B=2` stand for `--set A=1 --set B=2`: the words NAME=VALUE that follow are its values too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        option: str | None = None
        for word in args:
            if word.startswith("-"):
                option = word if word in _SEVERAL else None
            elif option and words[-1] != option:
                if "=" in word and not Path(word).exists():
                    words.append(option)
                else:
                    option = None
            words.append(word)
        return super().parse_args(ctx, words)


@app.command(cls=SeveralValues)
def edit(
    photos: Annotated[list[Path], typer.Argument(help="pictures of faces", metavar="PHOTO...")],
    model: Annotated[str, typer.Option(help="models:/NAME@alias, models:/NAME/VERSION, an export or a run")],
    out: Annotated[Path, typer.Option(help="the folder to write pictures into", metavar="DIR")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="-1 absent, 1 present, beyond exaggerated; Beard=full", metavar="NAME=X..."),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="one slider from, to, steps: Smiling=-2:2:9", metavar="NAME=FROM:TO:STEPS")
    ] = None,
    attributes: Annotated[
        list[str] | None,
        typer.Option(help="what the photos show, where you know it: Smiling=1 (or 0)", metavar="NAME=X..."),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="of a run: latest, best or images-N")] = "latest",
    raw: Annotated[bool, typer.Option("--raw", help="a run's weights as trained, not their moving averages")] = False,
    align: Annotated[
        Literal["none", "auto"], typer.Option(help="auto: find the face and cut it out as fader align does")
    ] = "none",
    aligner: Annotated[
        str | None, typer.Option(help="with --align auto: a model that refines it", metavar="MODEL")
    ] = None,
) -> None:
    """Move the sliders on photos: original, reconstruction and edited pictures as PNG."""
    if not set_ and not sweep:
        raise ValueError("nothing to do: give --set Smiling=1.5 or --sweep Smiling=-2:2:9")
    if aligner and align == "none":
        raise ValueError(f"--aligner {aligner} is for --align auto; give that too")
    _check_folder(out)
    pictures = [(photo, _read(photo)) for photo in photos]

    import torch

    from pipeline import models
    from pipeline.images import grid, to_float

    loaded = models.load(model, checkpoint=checkpoint, ema=not raw)
    editing = loaded.editing
    sliders = [editing.slider(*_pair(word, "--set")) for word in set_ or []]
    sweeps = [_sweep(editing, word) for word in sweep or []]
    pairs = [_pair(word, "--attributes") for word in attributes or []]
    given = {name: editing.label(name, value) for name, value in pairs}
    if align == "auto":
        pictures, said = _aligned(pictures, models.load(aligner) if aligner else None)
    else:
        said = []
    squares, notes = zip(*(_square(photo, picture, loaded) for photo, picture in pictures))
    images = to_float(torch.stack(squares))
    labels, how = editing.labels(images, given)

    typer.echo(f"{model}: {loaded.card['method']} at {loaded.card['image_size']} pixels, {loaded.attributes!r}")
    for note in [*said, *filter(None, notes)]:
        typer.echo(f"note: {note}")
    for line in _shown(loaded, photos, labels, how):
        typer.echo(line)

    files: dict[str, bytes] = {}
    if set_:
        rows = _with_originals(images, editing.edit(images, labels, [[], sliders]))
        _add(files, "grid", grid(rows))
        for photo, row in zip(photos, rows):
            _add(files, photo.stem, _picture(row[-1]))
    for name, steps in sweeps:
        settings: list[Sequence[Slider]] = [[], *([*sliders, step] for step in steps)]
        rows = _with_originals(images, editing.edit(images, labels, settings))
        _add(files, f"sweep-{name}", grid(rows))
        for photo, row in zip(photos, rows):
            _add(files, f"{photo.stem}-{name}", grid(row[None]))
    for path in _write(out, files):
        typer.echo(f"wrote {path}")
    typer.echo("a row is one photo: original, reconstruction, then edited or the steps of a sweep")
    cutting = " --align auto" * (align == "auto") + (f" --aligner {aligner}" if aligner else "")
    sweep_one = f"--sweep {loaded.attributes.names[0]}=-2:2:9"
    typer.echo(f"next: fader edit {photos[0]} --model {model} {sweep_one} --out {out}{cutting}")


# --- what the user gave -----------------------------------------------------------------------------------------------


def _pair(word: str, option: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option} {word}: write NAME=VALUE, as {option} Smiling=1")
    return name, value


def _sweep(editing: Editing, word: str) -> tuple[str, list[Slider]]:
    """`Smiling=-2:2:9` to its name and nine sliders."""
    name, span = _pair(word, "--sweep")
    parts = span.split(":")
    if len(parts) != 3 or not parts[2].isdigit() or not 2 <= int(parts[2]) <= _MAX_STEPS:
        raise ValueError(f"--sweep {word}: write NAME=FROM:TO:STEPS with 2 to {_MAX_STEPS} steps, as Smiling=-2:2:9")
    first, last = (editing.slider(name, value).value for value in parts[:2])
    count = int(parts[2])
    values = [first + (last - first) * i / (count - 1) for i in range(count)]
    return name, [editing.slider(name, value) for value in values]


def _read(photo: Path) -> Any:
    """A decoded picture.

    Raises:
        ValueError: the file is no picture; its name stands in the message.
    """
    from pipeline.images import decode

    if photo.is_dir():
        raise ValueError(f"{photo} is a folder; name pictures in it, as {photo}/*.jpg")
    try:
        return decode(photo.read_bytes())
    except ValueError as error:
        raise ValueError(f"{photo}: {error}") from None


def _aligned(pictures: Sequence[tuple[Path, Any]], aligner: Model | None) -> tuple[list[tuple[Path, Any]], list[str]]:
    """The pictures cut to the largest face in each, and what is to be said of them.

    Raises:
        ValueError: a picture shows no face; its name stands in the message.
    """
    import numpy as np
    from PIL import Image

    from pipeline.faces import alignment

    if aligner is not None:
        alignment.check_aligner(aligner)
    cut, said = [], []
    for photo, picture in pictures:
        try:
            crop, faces = alignment.aligned(np.asarray(picture), aligner)
        except ValueError as error:
            raise ValueError(f"{photo}: {error}") from None
        cut.append((photo, Image.fromarray(crop)))
        if len(faces) > 1:
            said.append(f"{photo} shows {len(faces)} faces; the largest is taken")
        if not faces[0].sure:
            said.append(f"the face in {photo} was hardly seen; look whether it was cut rightly")
    return cut, said


def _square(photo: Path, picture: Any, model: Model) -> tuple[torch.Tensor, str]:
    """uint8 [S, S, C] as the model reads it, and a note when its own crop rule does not take a picture of that size."""
    import torch

    from pipeline.images import preprocess

    rule, note = model.preprocessing, ""
    try:
        rule.box(*picture.size)
    except ValueError:
        note = (
            f"{photo} is {picture.width}x{picture.height}, which the model's crop rule '{rule.crop}' does not take. "
            "Its centred square is used: the face should fill it as in the training images"
        )
        rule = dataclasses.replace(rule, crop="center")
    return torch.from_numpy(preprocess(picture, rule).copy()), note


# --- what it prints and writes ----------------------------------------------------------------------------------------


def _shown(model: Model, photos: Sequence[Path], labels: torch.Tensor, how: dict[str, str]) -> Iterator[str]:
    """What the photos show and who says so."""
    ways = {
        "given": "as given",
        "judge": "read by the model's judge",
        "estimated": "estimated by the best reconstruction (--attributes Smiling=1 tells it)",
    }
    for way, words in ways.items():
        names = [name for name, found in how.items() if found == way]
        if names:
            yield f"own attributes {words}: {', '.join(names)}"
    for photo, row in zip(photos, labels.tolist()):
        values = (f"{a.name}={_value(a, value)}" for a, value in zip(model.attributes, row))
        yield f"  {photo}: {' '.join(values)}"


def _value(attribute: Any, value: float) -> str:
    return f"{value:g}" if attribute.kind == "continuous" else attribute.value_name(int(value))


def _with_originals(images: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """[N, C, S, S] and [N, R, C, S, S] to [N, 1 + R, 3, S, S]."""
    import torch

    rows = torch.cat([images[:, None], edited], 1)
    return rows.expand(-1, -1, 3, -1, -1) if rows.shape[2] == 1 else rows


def _picture(image: torch.Tensor) -> Any:
    from pipeline.images import to_uint8

    return to_uint8(image[None])[0].numpy()


def _add(files: dict[str, bytes], stem: str, picture: Any) -> None:
    """Keep a picture as PNG under a name of its own: the second photo of a stem becomes STEM-2."""
    from pipeline.images import png_bytes

    name, number = stem, 2
    while f"{name}.png" in files:
        name, number = f"{stem}-{number}", number + 1
    files[f"{name}.png"] = png_bytes(picture)


def _check_folder(out: Path) -> None:
    """Raises ValueError before any work when `out` cannot be written."""
    there = out
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {there} cannot be written; name another folder")


def _write(out: Path, files: dict[str, bytes]) -> list[Path]:
    """Write all the files or none."""
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as written:
        for name, content in files.items():
            written.enter_context(replacing(out / name)).write(content)
    return [out / name for name in files]


if __name__ == "__main__":
    main(app)
