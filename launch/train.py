"""Train an experiment or go on with one: `fader train configs/X.yaml key=value …`, `fader train --resume RUN`.

The same words follow `accelerate launch … -m launch.train`.
"""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from launch.command import main, say_next
from launch.progress import is_first_rank, watching_training

if TYPE_CHECKING:
    from pipeline.config import Experiment
    from pipeline.training.interruption import Interrupted

log = logging.getLogger(__name__)


def train(
    config: Annotated[list[str] | None, typer.Argument(metavar="CONFIG [KEY=VALUE]...")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run; key=value overrides are allowed")] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="go on with CONFIG's run if there is one, else start it")] = False,
) -> None:
    """Train an experiment, or go on with one.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or a file RUN/stop end it between two steps, with everything saved.
    """
    words = config or []
    if resume is None and (not words or "=" in words[0]):
        raise ValueError("name a config file, as in 'fader train configs/faces_fader.yaml', or --resume RUN")
    if resume is not None and words and "=" not in words[0]:
        raise ValueError(f"--resume takes its config from the run; {words[0]} cannot be given too (key=value can)")
    if resume is not None and go_on:
        raise ValueError("--resume RUN and --continue are two ways to say it: give one of them")

    from pipeline.engine import leave
    from pipeline.training.interruption import Interrupted
    from pipeline.training.run import train as run_training

    experiment, folder, resumed = _what_to_train(words, resume, go_on)
    if is_first_rank():
        _leave_word(None)
        typer.echo(_announcement(experiment, folder, resumed))
    try:
        with watching_training() as watch:
            run_training(experiment, folder, resume=resumed, watch=watch)
    except Interrupted as stopped:
        leave()
        stop(stopped, f"go on with: fader train --resume {shlex.quote(str(folder))}")
    except FloatingPointError as error:
        raise ValueError(str(error)) from None
    leave()
    if is_first_rank():
        _say_what_came_of_it(experiment, folder)
        _leave_word(0)


def _what_to_train(words: list[str], resume: Path | None, go_on: bool) -> tuple["Experiment", Path, bool]:
    """Return the experiment, its run's folder, and whether that holds a run to go on with."""
    from pipeline.config import load, load_run

    if resume is not None:
        if not (resume / "config.yaml").exists():
            raise ValueError(f"{resume} holds no run to resume (no config.yaml in it)")
        return load_run(resume, words), resume, True
    given = load(words[0], words[1:])
    if not (go_on and (given.folder / "run.json").exists()):
        return given, given.folder, False
    kept = load_run(given.folder, words[1:])
    if kept.digest != given.digest and is_first_rank():
        log.warning("%s says otherwise than the run it began; %s goes on as it began", words[0], given.folder)
    return kept, given.folder, True


def _leave_word(code: int | None) -> None:
    """Write the exit code where a batch script reads it, because the launcher's exit code does not say; None clears it."""
    place = os.environ.get("FADER_EXIT_FILE")
    if place and code is None:
        Path(place).unlink(missing_ok=True)
    elif place:
        Path(place).write_text(f"{code}\n")


def stop(stopped: "Interrupted", advice: str) -> NoReturn:
    """Say that a run was asked to end and how to go on, and end this process with the code of the reason.

    A launcher takes any code but 0 for a crash, which it would mend by starting the workers again: a run that wants to
    go on in another job ends its workers with 0, and FADER_EXIT_FILE alone says so.
    """
    from pipeline.training.interruption import EXIT_AGAIN, launched

    code = stopped.reason.exit_code
    if is_first_rank():
        typer.echo(f"{stopped}\n{advice}", err=True)
        _leave_word(code)
    sys.stdout.flush()
    sys.exit(0 if code == EXIT_AGAIN and launched() else code)


def _announcement(experiment: Any, folder: Path, resumed: bool) -> str:
    size = experiment.data.image_size
    verb = "resuming" if resumed else "training"
    return (
        f"{verb} {experiment.name}: {experiment.method_name} on {experiment.data.path} at {size}x{size}, "
        f"batch {experiment.batch_size}, {experiment.precision}, run in {folder}"
    )


def _say_what_came_of_it(experiment: Any, folder: Path) -> None:
    typer.echo(f"wrote {folder} (config, checkpoints)")
    if experiment.method_name == "aligner":
        say_next("align", "PHOTO", "OUT", "--model", folder)
        return
    say_next("evaluate", folder)
    if experiment.method_name == "judge":
        say_next("train", "CONFIG", f"judge={folder}")
    else:
        say_next("register", folder, "--name", experiment.name)


if __name__ == "__main__":
    main(train)
