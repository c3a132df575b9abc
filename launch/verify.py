"""`fader verify`: a shard set is read back whole and compared with its manifest and digests."""

from typing import Annotated

import typer

from launch.command import main
from launch.prepare import Workers
from launch.progress import progress_bar


def verify(
    out: Annotated[str, typer.Argument(help="Folder or address of a finished shard set.")], workers: Workers = None
) -> None:
    """Read a shard set back whole; name what is damaged and exit with code 2."""
    from pipeline.data import shards

    with progress_bar("reading back") as progress:
        report = shards.verify(out, workers=workers, progress=progress)
    typer.echo(f"{out} is whole: {report.records:,} records in {report.shards} shards, {report.size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main(verify)
