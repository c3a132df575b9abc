"""`fader sample MODEL --set Smiling=1 --count 16 --out DIR`: pictures of faces that nobody has."""

from typing import Annotated

import typer

from launch import values
from launch.command import LARGEST_SEED, main, say_next

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_ACROSS = 8


@app.command(cls=values.SeveralValues)
def sample(
    model: Annotated[str, typer.Argument(help="models:/NAME@alias, an export or a run", metavar="MODEL")],
    out: values.Pictures,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="of the first picture; the next has the next seed")] = 0,
    count: Annotated[int, typer.Option(help="pictures", min=1, max=1_000)] = 16,
    set_: values.Moves = None,
    only: Annotated[bool, typer.Option("--only", help="attributes that are not set are absent")] = False,
    truncation: Annotated[float | None, typer.Option(min=0.01, help="of the noise: smaller is better and more alike")] = None,
    to: Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="from --seed's picture to this seed's")] = None,
    grid_only: Annotated[bool, typer.Option("--grid", help="one picture of them all, and no others")] = False,
    checkpoint: values.Checkpoint = "latest",
    raw: values.Raw = False,
) -> None:
    """Make new pictures.

    Attributes that are not set are drawn by the seed, together, as they occur in the training data beside those that are.
    """
    values.check_folder(out)
    if to == seed or (to is not None and count < 2):
        raise ValueError("--to takes another seed than --seed, and --count at least 2 pictures from the one to the other")
    import torch

    from pipeline import models
    from pipeline.faces.photos import pixels_of
    from pipeline.files import write_all
    from pipeline.images import grid, png_bytes

    loaded = models.load(model, checkpoint=checkpoint, ema=not raw)
    sampling = loaded.sampling
    seeds = torch.arange(seed, seed + count) if to is None else torch.full((count,), seed)
    images = sampling.sample(seeds, None, values.sliders(sampling, set_), only, truncation, to)
    if sampling.occurring is None and not only:
        typer.echo(f"{model} keeps no labels of its training data: what is not set is drawn evenly")
    blank = images.new_ones(-count % min(_ACROSS, count), *images.shape[1:])
    files = {"grid.png": png_bytes(grid(torch.cat([images, blank]).unflatten(0, (-1, min(_ACROSS, count)))))}
    for number, image in enumerate(() if grid_only else images, seed):
        name = f"seed-{number}" if to is None else f"seed-{seed}-to-{to}-{number - seed:03d}"
        files[f"{name}.png"] = png_bytes(pixels_of(image))
    for path in write_all(out, files):
        typer.echo(f"wrote {path}")
    name, value = sampling.example_slider()
    say_next("sample", model, "--seed", seed + count, "--set", f"{name}={value}", "--out", out)


if __name__ == "__main__":
    main(app)
