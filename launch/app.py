"""`fader app --model MODEL`: a page in the browser with a photo and the model's sliders."""

import secrets
from pathlib import Path
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
    token: Annotated[str | None, typer.Option(help="what a page must know; made where others reach the address")] = None,
    checkpoint: values.Checkpoint = "latest",
    raw: values.Raw = False,
    aligner: Annotated[str | None, typer.Option(help="a model that refines where faces are", metavar="MODEL")] = None,
    runs: Annotated[Path, typer.Option(help="whose runs, and the registry's models, can be chosen on the page")] = Path("runs"),
    study: Annotated[Path | None, typer.Option(help="instead: pictures to rate; the file of the answers", metavar="CSV")] = None,
    data: Annotated[Path | None, typer.Option(help="with --study: a shard set; by default the model's own")] = None,
    split: Annotated[str, typer.Option(help="with --study: train, valid or test")] = "test",
) -> None:
    """Serve the page until Ctrl-C. Photos stay in memory and go when their page is closed."""
    from pipeline.app import server
    from pipeline.app.shelf import Shelf, opened
    from pipeline.app.study import Study
    from pipeline.evaluation import Specification
    from pipeline.faces.alignment import load_aligner

    listener = server.listener(host, port)
    first = opened(model, checkpoint=checkpoint, ema=not raw)
    loaded, rated = first.model, None
    if study:
        records = Specification(data=data).open(loaded).split(split)
        rated = Study(loaded, loaded.editing, records, study)
    if token is None and not server.is_loopback(host):
        token = secrets.token_urlsafe(16)
    service = server.Service(Shelf(first, runs), load_aligner(aligner), token, rated)
    typer.echo(f"{model}: {loaded.card['method']} at {loaded.card['image_size']} pixels, {loaded.attributes!r}")
    typer.echo(first.decoder)
    place = f"[{host}]" if ":" in host else host
    secret = f"#{quote(token, safe='')}" if token else ""
    address = f"http://{place}:{listener.getsockname()[1]}/{secret}"
    if not server.is_loopback(host):
        typer.echo("note: everybody who has this address can use the page; without TLS others on the way can read it")
    if study:
        typer.echo(f"answers go to {study}; 'fader study {study}' says what they are")
    typer.echo(f"open {address}   (Ctrl-C ends it)")
    server.server(service).run(sockets=[listener])


if __name__ == "__main__":
    main(app)
