"""Show how far long work is: a bar on a terminal, on standard error."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pipeline.training.loop import Progress


def is_first_rank() -> bool:
    """Whether this process speaks for a launch; a launcher that starts several says which it is."""
    return os.environ.get("RANK", "") in ("", "0")


def draws_bars() -> bool:
    return sys.stderr.isatty() and is_first_rank()


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """Give a function of (done, total) that moves a bar with rate and time left; a third word stands in for the rate."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    text = TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True))  # a narrow terminal cuts this one
    columns = (TextColumn(what), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), text)
    with Progress(*columns, console=Console(stderr=True), disable=not draws_bars(), expand=True) as bar:
        task = bar.add_task(what, total=None, text="")

        def progress(done: int, total: int, text: str = "") -> None:
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, total=total, text=text or (f"{speed:,.0f}/s" if speed else ""))

        yield progress


@contextlib.contextmanager
def watching_training() -> Iterator[Callable[["Progress"], None]]:
    """Give the function that `train` tells of each interval: a bar on a terminal, a line an interval elsewhere."""
    with progress_bar("images") as bar:

        def watch(progress: "Progress") -> None:
            clock, total = progress.clock.images, progress.total_images
            text = f"{progress.images_per_second:,.0f} images/s  {_duration(progress.seconds_left)} left  {_losses(progress)}"
            if draws_bars():
                bar(clock, total, text)
            else:
                typer.echo(f"{clock:>10,} / {total:,} images  {text}", err=True)

        yield watch


def _losses(progress: "Progress") -> str:
    """Losses and weights; the rest goes to the tracker."""
    hidden = ("/gradient_norm", "/skipped")
    shown = {k: v for k, v in progress.metrics.items() if not k.endswith(hidden) and "." not in k}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
