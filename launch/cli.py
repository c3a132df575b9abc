"""`fader`: one command line over the thin modules beside this file, each imported only when it is called."""

import importlib
import sys

import typer

from launch.command import main as run
from launch.output import make_tolerant

COMMANDS = {
    "demo": "draw faces, shard, train a judge and a Fader network, evaluate, register: the whole way in minutes",
    "prepare": "an attribute-labelled image set to WebDataset tars with a manifest",
    "inspect": "what a shard set holds: counts, balance, sizes, duplicates, in text and pictures",
    "verify": "read a shard set back and hold it against its manifest",
    "align": "faces in photos, turned, scaled and cut as CelebA's are",
    "train": "train what a config says; --resume RUN goes on",
    "evaluate": "does it slide? tables over a split",
    "sweep": "an experiment at every point of a grid, evaluated and set side by side",
    "compare": "runs side by side, and what their swaps cost in reconstruction",
    "register": "export a run and register it as a version in MLflow",
    "promote": "evaluate a registered version, and make it the champion when it holds",
    "export": "a model as a folder of plain tensors, or as ONNX",
    "edit": "move the sliders on photos",
    "app": "a page in the browser: a photo, and the sliders that move it",
    "study": "what people said of a study's pictures: how natural they look, and whether they show what was asked for",
    "sample": "pictures of faces that nobody has, from chosen attributes and a seed",
    "bench": "measure this machine: how fast data comes, beside others and beside DALI alone",
    "sync": "send what tracking could not deliver",
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  fader {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return f"Attribute sliders, from image bytes to a served model.\n\n{rows}\n\n`fader COMMAND --help` says more."


def main() -> None:
    make_tolerant()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        typer.echo(_help())
        sys.exit(0)
    name = arguments[0]
    if name not in COMMANDS:
        typer.echo(f"error: there is no command {name!r}\n\n{_help()}", err=True)
        sys.exit(2)
    sys.argv = [f"fader {name}", *arguments[1:]]
    module = importlib.import_module(f"launch.{name}")
    run(getattr(module, "app", None) or getattr(module, name), prog=f"fader {name}")


if __name__ == "__main__":
    main()
