"""Train an experiment to its end, or go on with a run."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pipeline.config import Experiment
from pipeline.training.assembly import Run
from pipeline.training.interruption import Interrupted, Listener
from pipeline.training.loop import Loop, Progress


def train(experiment: Experiment, run: Path, *, resume: bool = False, watch: Callable[[Progress], None] | None = None) -> Path:
    """Train an experiment to its end. Every rank calls it and makes the same steps.

    run: the run's folder. It must not hold a run yet, unless `resume`.
    resume: go on from the newest sound checkpoint (from the start when there is none yet).
    watch: called on the main rank at each log interval.
    Returns: The run's folder.
    Raises ValueError: what the user gave does not fit together; another process trains in the folder. Interrupted: a signal or a
    stop file ended it (see `pipeline.training.interruption`); everything is saved. FloatingPointError: updates were not finite,
    again and again after the run went back to a checkpoint. OSError: the last checkpoint could not be saved.
    """
    with Listener() as listener, ExitStack() as stack:
        return complete(Run(experiment, run, resume, listener, stack), watch)


def complete(run: Run, watch: Callable[[Progress], None] | None = None) -> Path:
    """Train a run that was put together to its end, and tell its tracker how it ended."""
    status = "FAILED"
    try:
        with run.watchdog:
            Loop(run, watch).to_the_end()
            if run.writer:
                run.writer.close()
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        if run.writer:
            run.writer.wait()  # the folder is given up after this
        run.tracker.finish(status)
    return run.folder
