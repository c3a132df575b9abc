"""`fader bench`: how fast data comes and a step is, measured on this machine beside what others offer and bare loops."""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from launch import bench_train
from launch.command import main, numbers, write_figures

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

SIZES = "64,128,256"
RATIOS = ("streamed/bare", "streamed/floats", "streamed/files", "cached/streamed")
COLUMNS = ("bare", "floats", "streamed", "cached", "webdataset", "files")


@app.callback()
def bench() -> None:
    """Measure this machine."""


app.command()(bench_train.train)
app.command()(bench_train.scale)


@app.command()
def data(
    path: Annotated[Path | None, typer.Option("--data", help="A shard set; by default faces are drawn for it.")] = None,
    sizes: Annotated[str, typer.Option(help="Pixels a side, parted by commas.")] = SIZES,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    threads: Annotated[int, typer.Option(min=1, help="DALI's threads; worker processes of the others.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that everyone has; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long a turn is.")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = "",
    count: Annotated[int, typer.Option(min=10, help="Faces to draw where no set is given.")] = 2_000,
    to: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.", metavar="FILE")] = None,
) -> None:
    """Images a second of our loaders, of webdataset and a torch DataLoader with Pillow, and of DALI alone, the limit;
    fader prepare beside tar."""
    import torch

    from pipeline.data.shards import ShardSet
    from pipeline.loading import throughput

    wanted = numbers(sizes, "--sizes")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    measure = throughput.Measure(batch_size, threads, rounds, seconds, place)
    with tempfile.TemporaryDirectory(prefix="fader-bench-") as folder:
        work = Path(folder)
        shards = ShardSet.open(path or _drawn(work / "drawn", count))
        split = shards.split("train")
        if batch_size > len(split):
            raise ValueError(f"a batch of {batch_size} and {len(split)} records; give a larger set or --batch-size")
        about = throughput.machine()
        figures: dict[str, Any] = {
            "machine": about,
            "command": ["fader", "bench", *sys.argv[1:]],
            "set": {"name": shards.name, "digest": shards.digest, "records": len(split)},
            "batch_size": batch_size, "threads": threads, "rounds": rounds, "seconds": seconds, "device": str(place),
            "images_per_second": {},
        }  # fmt: skip
        typer.echo(_heading(about, figures))
        files = throughput.write_files(split, work / "files")
        figures["prepare_seconds"] = throughput.prepare_seconds(files, work, rounds)
        typer.echo(_prepare_line(figures["prepare_seconds"], len(files)))
        typer.echo("\n" + " ".join([f"{'images/s':>10}", *(f"{name:>11}" for name in COLUMNS), *RATIOS]))
        for size in wanted:
            preprocessing = _preprocessing(split, size)
            rates = throughput.loading_rates(split, preprocessing, work, measure, _show)
            figures["images_per_second"][str(size)] = rates
            typer.echo(_line(size, rates))
    write_figures(to, figures)
    typer.echo("docs/performance.md says what these figures should be")


def _show(what: str) -> None:
    """Show on a terminal what is being measured; it goes when the line is done."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="\r", file=sys.stderr, flush=True)


def _drawn(out: Path, count: int) -> Path:
    from pipeline.data import shards
    from pipeline.data.datasets import DATASETS

    shards.prepare(DATASETS["faces"](out / "source", count=count), out, shard_records=1024)
    return out


def _preprocessing(split: Any, size: int) -> Any:
    from pipeline.images import CELEBA_SIZE, Preprocessing

    celeba = bool((split.width == CELEBA_SIZE[0]).all() and (split.height == CELEBA_SIZE[1]).all())
    return Preprocessing(size, crop="celeba" if celeba else "center")


def _heading(about: dict[str, Any], figures: dict[str, Any]) -> str:
    where = f"{about['cores']} cores of {about['cpu']}" + (f", {about['gpu']}" if about["gpu"] else "")
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "nvidia-dali-cuda130", "webdataset", "pillow"))
    busy = f"\nother work keeps it busy (load {about['load']:.1f}): look at the ratios" if about["load"] > 1 else ""
    return (
        f"{where}, {about['memory_bytes'] / 2**30:.0f} GiB; {versions}\n"
        f"{figures['set']['name']}, {figures['set']['records']:,} records; batches of {figures['batch_size']} "
        f"on {figures['device']}, {figures['threads']} threads; "
        f"median of {figures['rounds']} turns of {figures['seconds']:g} s{busy}\n"
    )


def _prepare_line(seconds: dict[str, list[float]], count: int) -> str:
    from pipeline.loading.throughput import median_ratio

    shown = []
    for name, label in (("prepare", "prepare"), ("prepare header", "prepare --check header")):
        rate, share = count / statistics.median(seconds[name]), median_ratio(seconds, "tar", name)
        shown.append(f"{label} {rate:,.0f} records/s, {share:.0%} of tar's speed")
    return f"tar cf {count / statistics.median(seconds['tar']):,.0f} records/s; " + "; ".join(shown)


def _line(size: int, rates: dict[str, list[float]]) -> str:
    from pipeline.loading.throughput import median_ratio

    shown = " ".join(f"{statistics.median(rates[name]):>11,.0f}" for name in COLUMNS)
    ratios = (f"{median_ratio(rates, *name.split('/')):>{len(name)}.2f}" for name in RATIOS)
    return " ".join([f"{size:>10}", shown, *ratios])


if __name__ == "__main__":
    main(app)
