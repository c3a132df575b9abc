"""`fader train configs/X.yaml key=value …`, `fader train --resume RUN`, and the same under `accelerate launch -m launch.train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.command import main

if TYPE_CHECKING:
    from pipeline.train import Progress


def train(
    config: Annotated[list[str] | None, typer.Argument(help="a config file, then key=value overrides", metavar="CONFIG [KEY=VALUE]...")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run; key=value overrides are allowed")] = None,
) -> None:
    """Train an experiment, or go on with one."""
    words = config or []
    if resume is None and (not words or "=" in words[0]):
        raise ValueError("name a config file, as in 'fader train configs/faces_fader.yaml', or --resume RUN")
    if resume is not None and words and "=" not in words[0]:
        raise ValueError(f"--resume takes its config from the run; {words[0]} cannot be given too (key=value can)")

    from pipeline.config import load
    from pipeline.train import Interrupted
    from pipeline.train import train as run_training

    if resume is None:
        experiment = load(words[0], words[1:])
        folder = experiment.folder
    else:
        if not (resume / "config.yaml").exists():
            raise ValueError(f"{resume} holds no run to resume (no config.yaml in it)")
        experiment = load(resume / "config.yaml", words)
        folder = resume
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        typer.echo(_announcement(experiment, folder, resume is not None))
    watcher = _Watcher()
    try:
        with watcher:
            run_training(experiment, folder, resume=resume is not None, watch=watcher)
    except Interrupted as stopped:
        if first:
            typer.echo(f"{stopped}\ngo on with: fader train --resume {folder}", err=True)
        sys.stdout.flush()
        sys.exit(128 + stopped.signal)
    except FloatingPointError as error:
        raise ValueError(str(error)) from None
    if first:
        typer.echo(_ending(experiment, folder))


def _announcement(experiment: Any, folder: Path, resumed: bool) -> str:
    size = experiment.data.image_size
    verb = "resuming" if resumed else "training"
    return (
        f"{verb} {experiment.name}: {experiment.method_name} on {experiment.data.path} at {size}x{size}, "
        f"batch {experiment.batch_size}, {experiment.precision}, run in {folder}"
    )


def _ending(experiment: Any, folder: Path) -> str:
    lines = [f"wrote {folder} (config, checkpoints)"]
    if experiment.method_name == "judge":
        lines.append(f"next: fader train CONFIG judge={folder}")
    else:
        lines.append(f"next: fader evaluate {folder}    or    fader register {folder} --name {experiment.name}")
    return "\n".join(lines)


class _Watcher:
    """A progress bar on a terminal, a line an interval elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> _Watcher:
        if sys.stderr.isatty() and int(os.environ.get("RANK", "0")) == 0:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self.bar = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), console=Console(stderr=True)
            )
            self.bar.start()
            self.task = self.bar.add_task("images", total=None, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        text = f"{progress.images_per_second:,.0f} images/s  {_duration(progress.seconds_left)} left  {_shown(progress)}"
        if self.bar:
            self.bar.update(self.task, completed=progress.clock.images, total=progress.total_images, text=text)
        else:
            typer.echo(f"{progress.clock.images:>10,} / {progress.total_images:,} images  {text}", err=True)


def _shown(progress: Progress) -> str:
    """Losses and weights; the rest goes to the tracker."""
    hidden = ("/gradient_norm", "/skipped")
    shown = {k: v for k, v in progress.metrics.items() if not k.endswith(hidden) and "." not in k}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


if __name__ == "__main__":
    main(train)
