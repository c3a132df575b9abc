"""`fader app --model MODEL`: a page in the browser with a photo and the model's sliders."""

from __future__ import annotations

import secrets
from typing import Annotated
from urllib.parse import quote

import typer

from launch import values
from launch.command import main

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def page(
    model: Annotated[str, typer.Option(help="models:/NAME@alias, models:/NAME/VERSION, an export or a run")],
    host: Annotated[str, typer.Option(help="the address to listen on; only this machine reaches the default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free")] = 7860,
    token: Annotated[
        str | None, typer.Option(help="what a page must know; made and printed where others reach the address")
    ] = None,
    checkpoint: values.Checkpoint = "latest",
    raw: values.Raw = False,
    aligner: Annotated[str | None, typer.Option(help="a model that refines where faces are", metavar="MODEL")] = None,
) -> None:
    """Serve the page until Ctrl-C. Photos stay in memory and go when their page is closed."""
    from pipeline import models
    from pipeline.app import server
    from pipeline.faces.alignment import load_aligner
    from pipeline.models.onnx import faster

    listener = server.listener(host, port)
    loaded = models.load(model, checkpoint=checkpoint, ema=not raw)
    if token is None and not server.is_loopback(host):
        token = secrets.token_urlsafe(16)
    editing = next((can for can in loaded.capabilities if isinstance(can, models.Editing | models.Sampling)), None)
    if editing is None:
        raise ValueError(f"{model}: {loaded.card['method']} neither edits photos nor samples faces; it has no sliders")
    decoder = faster(editing) if isinstance(editing, models.Editing) else "it makes faces of seeds"
    service = server.Service(loaded, editing, load_aligner(aligner), token)
    typer.echo(f"{model}: {loaded.card['method']} at {loaded.card['image_size']} pixels, {loaded.attributes!r}")
    typer.echo(decoder)
    place = f"[{host}]" if ":" in host else host
    secret = f"#{quote(token, safe='')}" if token else ""
    address = f"http://{place}:{listener.getsockname()[1]}/{secret}"
    if not server.is_loopback(host):
        typer.echo("note: everybody who has this address can use the page; without TLS others on the way can read it")
    typer.echo(f"open {address}   (Ctrl-C ends it)")
    server.server(service).run(sockets=[listener])


if __name__ == "__main__":
    main(app)
