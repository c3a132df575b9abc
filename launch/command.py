"""How every command ends: one clear line and exit code 2 for what a user can mend, 130 for Ctrl-C, a traceback for a bug."""

import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launch.output import failures, make_tolerant
from pipeline.files import ensure_home

if TYPE_CHECKING:
    from pipeline.evaluation import Table

# Some versions of typer bring their own copy of click; this is the one that the installed typer raises.
ClickException = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
LARGEST_SEED = 2**63 - 1  # that torch takes


def main(command: typer.Typer | Callable[..., Any], prog: str | None = None) -> None:
    """Run a typer app, or one function as a command, and exit with its code."""
    make_tolerant()
    ensure_home()
    logging.basicConfig(level=os.environ.get("FADER_LOG_LEVEL", "INFO").upper(), format="%(message)s", stream=sys.stderr)
    for chatty in ("mlflow", "alembic", "accelerate", "deepspeed", "DeepSpeed", "urllib3", "matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    app = command if isinstance(command, typer.Typer) else _single(command)
    try:
        code = app(standalone_mode=False, prog_name=prog)
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except ClickException as error:
        error.show()
        code = EXIT_USER_ERROR
    except Exception as error:
        from pipeline.tracking import without_password

        code = EXIT_USER_ERROR if isinstance(error, (ValueError, OSError)) or _is_elsewhere(error) else 1
        if code == 1 or os.environ.get("FADER_TRACEBACK"):
            print(without_password(traceback.format_exc()), file=sys.stderr)
        else:
            print(f"error: {without_password(describe(error))}", file=sys.stderr)
    if code == EXIT_INTERRUPTED:  # typer may have made an exit code of Ctrl-C already
        print("interrupted", file=sys.stderr)
    for failure in failures():
        print(failure, file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _is_elsewhere(error: BaseException) -> bool:
    """Return whether a package that is not ours is missing, such as the driver of a database that an address asks for."""
    ours = ("fader", "pipeline", "launch", "tests")
    return isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ours


def show(table: "Table") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    drawn = Drawn(title=table.title, caption=table.note, box=box.SIMPLE_HEAD)
    drawn.title_justify = drawn.caption_justify = "left"
    for i, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if i == 0 else "right")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def say_next(*words: object) -> None:
    """Print the command to try next as a shell takes it. Words in capitals stand for what only the user knows."""
    typer.echo(f"next: {shlex.join(['fader', *map(str, words)])}")


def describe(error: BaseException) -> str:
    """One line: a user's mistake as it was worded, an OSError with the file it speaks of, a package that is missing."""
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    if isinstance(error, ModuleNotFoundError):
        return f"this needs the Python package {error.name}, which is not installed here; install it and try again"
    return " ".join(str(error).split()) or type(error).__name__


def _single(function: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app


def numbers(text: str, option: str) -> list[int]:
    """The whole numbers of an option's text, parted by commas. Raises ValueError: it has something else, or nothing."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} is {text!r}; whole numbers parted by commas are needed, as 64,128")
    return [int(part) for part in parts]


def write_figures(to: Path | None, figures: dict[str, Any]) -> None:
    """Write figures as JSON where `--json` names a file, and say so."""
    if to:
        to.write_text(json.dumps(figures, indent=1) + "\n")
        typer.echo(f"wrote {to}")
