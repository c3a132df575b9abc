"""`fader edit PHOTO… --model MODEL --set Smiling=1.5 --out DIR`: move the sliders on photos, or sweep, swap and cross them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch import values
from launch.command import describe, main, say_next
from launch.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from fader.attributes import Attribute
    from pipeline.faces.edits import Album
    from pipeline.faces.photos import Portrait
    from pipeline.models import Model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_TOGETHER = 16  # photos that are in memory at once


@app.command(cls=values.SeveralValues)
def edit(
    photos: Annotated[list[Path], typer.Argument(help="pictures of faces, and folders of them", metavar="PHOTO...")],
    model: Annotated[str, typer.Option(help="models:/NAME@alias, models:/NAME/VERSION, an export or a run")],
    out: values.Pictures,
    set_: values.Moves = None,
    sweep: Annotated[list[str] | None, typer.Option(help="one slider: Smiling=-2:2:9", metavar="NAME=FROM:TO:STEPS")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="two sliders, down and across", metavar="NAME=... NAME=...")] = None,
    swap: Annotated[Literal["all"] | None, typer.Option(help="all: each attribute in turn at another value")] = None,
    animate: Annotated[bool, typer.Option("--animate", help="with --sweep: also as a moving WebP")] = False,
    attributes: Annotated[list[str] | None, typer.Option(help="what is known: Smiling=1 (or 0)", metavar="NAME=X...")] = None,
    checkpoint: values.Checkpoint = "latest",
    raw: values.Raw = False,
    align: Annotated[Literal["none", "auto"], typer.Option(help="auto: find the face first, as fader align does")] = "none",
    aligner: Annotated[str | None, typer.Option(help="with --align auto: a model that refines it", metavar="MODEL")] = None,
    face: Annotated[int, typer.Option(min=1, help="with --align auto: which of a photo's faces, the largest first")] = 1,
    paste: Annotated[bool, typer.Option(help="with --set: also the whole photo with the edited face in it")] = False,
) -> None:
    """Move the sliders on photos: original, reconstruction and edited pictures as PNG. Only pictures of ours are replaced."""
    if not (set_ or sweep or grid or swap):
        raise ValueError("nothing to do: give --set Smiling=1.5, --sweep Smiling=-2:2:9, --grid or --swap all")
    for wrong, line in (
        (animate and not sweep, "--animate moves the steps of a sweep; give --sweep too"),
        (aligner and align == "none", f"--aligner {aligner} is for --align auto; give that too"),
        (face > 1 and align == "none", f"--face {face} is for --align auto; give that too"),
        (paste and not set_, "--paste puts the face that --set edits back into its photo; give --set too"),
    ):
        if wrong:
            raise ValueError(line)
    values.check_folder(out)

    from pipeline import models
    from pipeline.faces import edits
    from pipeline.faces import photos as road
    from pipeline.faces.alignment import load_aligner

    paths = road.listed(photos)
    loaded = models.load(model, checkpoint=checkpoint, ema=not raw)
    editing, refiner = loaded.editing, load_aligner(aligner)
    sweeps, crossed = dict(values.sweep(editing, word) for word in sweep or []), values.crossed(editing, grid)
    wanted = edits.Wanted(values.sliders(editing, set_), sweeps, crossed, swap == "all", animate, paste)
    given = values.labels(editing, attributes)

    def cut(path: Path) -> Portrait:
        return _chosen(road.portraits(str(path), road.read(path), loaded.preprocessing, align == "auto", refiner), face)

    typer.echo(f"{model}: {loaded.card['method']} at {loaded.card['image_size']} pixels, {loaded.attributes!r}")
    left_out = _make(edits.Album(loaded, wanted, out), paths, cut, loaded, given)
    typer.echo("a row is one photo: original, reconstruction, then edited, the steps of a sweep, or the swaps")
    cutting = [*(["--align", "auto"] if align == "auto" else []), *(["--aligner", aligner] if aligner else [])]
    name = ".".join([loaded.attributes[0].name, *loaded.attributes[0].categories[:1]])
    say_next("edit", photos[0], "--model", model, "--sweep", f"{name}=-2:2:9", "--out", out, *cutting)
    if left_out:
        typer.echo(f"error: {left_out} of {len(paths)} photos were left out; the lines above say why", err=True)
        raise typer.Exit(1)


def _make(album: Album, paths: Sequence[Path], cut: Callable[[Path], Portrait], model: Model, given: dict[str, float]) -> int:
    """Edit the photos some at a time, saying how far it is; return how many were left out, which only many may be."""
    from pipeline.faces.edits import fastest_batch
    from pipeline.faces.photos import images_of

    made, size = 0, _TOGETHER
    with progress_bar("photos") as progress:
        for first in range(0, len(paths), _TOGETHER):
            portraits = []
            for path in paths[first : first + _TOGETHER]:
                try:
                    portraits.append(cut(path))
                except (ValueError, OSError) as error:
                    if len(paths) == 1:
                        raise
                    typer.echo(f"left out: {describe(error)}", err=True)
            if portraits:
                images = images_of(portraits)
                labels, origins = model.editing.labels(images, given)
                if not made and len(paths) > _TOGETHER:
                    size = fastest_batch(model.editing, images, labels)
                    typer.echo(f"{size} at a time are the fastest here")
                for line in _about(portraits, model, labels, {} if made else origins):
                    typer.echo(line)
                for at in range(0, len(portraits), size):
                    for path in album.add(portraits[at : at + size], labels[at : at + size]):
                        typer.echo(f"wrote {path}")
            made += len(portraits)
            progress(min(first + _TOGETHER, len(paths)), len(paths))
    if not made:
        raise ValueError(f"none of {len(paths)} photos could be edited; the lines above say why")
    for path in album.close():
        typer.echo(f"wrote {path}")
    return len(paths) - made


def _chosen(portraits: Sequence[Portrait], face: int) -> Portrait:
    """Return one of a photo's portraits, with a note where there are others."""
    name = portraits[0].name
    if face > len(portraits):
        raise ValueError(f"{name} shows {len(portraits)} faces; --face {face} asks for one more")
    chosen = portraits[face - 1]
    if len(portraits) == 1:
        return chosen
    which = "the largest" if face == 1 else f"number {face}, the largest first,"
    return dataclasses.replace(chosen, notes=(f"{name} shows {len(portraits)} faces; {which} is taken", *chosen.notes))


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
