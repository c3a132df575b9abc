"""`fader edit PHOTO… --model MODEL --set Smiling=1.5 --out DIR`: move the sliders on photos, or sweep one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch import values
from launch.command import main, say_next

if TYPE_CHECKING:
    import torch

    from fader.attributes import Attribute
    from pipeline.faces.photos import Portrait
    from pipeline.models import Model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=values.SeveralValues)
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
    aligner: Annotated[str | None, typer.Option(help="with --align auto: a model that refines it", metavar="MODEL")] = None,
    paste: Annotated[bool, typer.Option(help="with --set: also the whole photo with the edited face in it")] = False,
) -> None:
    """Move the sliders on photos: original, reconstruction and edited pictures as PNG."""
    if not set_ and not sweep:
        raise ValueError("nothing to do: give --set Smiling=1.5 or --sweep Smiling=-2:2:9")
    if aligner and align == "none":
        raise ValueError(f"--aligner {aligner} is for --align auto; give that too")
    if paste and not set_:
        raise ValueError("--paste puts the face that --set edits back into its photo; give --set too")
    values.check_folder(out)

    from pipeline import models
    from pipeline.faces import photos as road
    from pipeline.faces.alignment import load_aligner

    pictures = [(str(photo), road.read(photo)) for photo in photos]
    loaded = models.load(model, checkpoint=checkpoint, ema=not raw)
    editing = loaded.editing
    sliders = values.sliders(editing, set_)
    sweeps = dict(values.sweep(editing, word) for word in sweep or [])
    given = values.labels(editing, attributes)
    portraits = road.portraits(pictures, loaded.preprocessing, align == "auto", load_aligner(aligner))
    labels, origins = editing.labels(road.images_of(portraits), given)

    typer.echo(f"{model}: {loaded.card['method']} at {loaded.card['image_size']} pixels, {loaded.attributes!r}")
    for line in _about(portraits, loaded, labels, origins):
        typer.echo(line)
    for path in road.edited(editing, portraits, labels, sliders, sweeps, paste).write(out):
        typer.echo(f"wrote {path}")
    typer.echo("a row is one photo: original, reconstruction, then edited or the steps of a sweep")
    cutting = [*(["--align", "auto"] if align == "auto" else []), *(["--aligner", aligner] if aligner else [])]
    name, value = editing.example_slider()
    moved = ["--sweep", f"{name}=-2:2:9"] if loaded.attributes[0].kind != "k-way" else ["--set", f"{name}={value}"]
    say_next("edit", photos[0], "--model", model, *moved, "--out", out, *cutting)


_ORIGINS = {
    "given": "as given",
    "judge": "read by the model's judge",
    "estimated": "estimated by the best reconstruction (--attributes Smiling=1 tells it)",
}


def _about(portraits: Sequence[Portrait], model: Model, labels: torch.Tensor, origins: dict[str, str]) -> Iterator[str]:
    """Say how the photos were cut, what they show, and where that comes from."""
    yield from (f"note: {note}" for portrait in portraits for note in portrait.notes)
    for origin, words in _ORIGINS.items():
        names = [name for name, given in origins.items() if given == origin]
        if names:
            yield f"own attributes {words}: {', '.join(names)}"
    for portrait, row in zip(portraits, labels.tolist()):
        yield f"  {portrait.name}: {' '.join(f'{a.name}={_value(a, value)}' for a, value in zip(model.attributes, row))}"


def _value(attribute: Attribute, value: float) -> str:
    return f"{value:g}" if attribute.kind == "continuous" else attribute.value_name(int(value))


if __name__ == "__main__":
    main(app)
