"""Every command of README.md and docs/ is run by a test, or is marked as not run and is at least one that can be typed.

A block fenced as ```bash is run by the test of its page (`RUN`). An indented block is not run: it takes hours, needs a GPU or
a cluster, or holds words that stand for the reader's own (`STAND_FOR`). Its commands are read here by the commands' own
parsers, its settings by the config, so that a renamed option or setting is found. docs/log.md tells of the past.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from launch.cli import COMMANDS
from pipeline import config
from pipeline.training import sweep
from tests.commands import ROOT

PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.name != "log.md")
RUN = {"data.md": "tests/test_docs_data.py", "cluster.md": "tests/slurm/test_docs.py", "using.md": "tests/test_docs_using.py"}
STAND_FOR = {
    "RUN|MODEL...": "runs/x", "RUN...": "runs/x", "CONFIG": "configs/faces_fader.yaml", "key=value": "seed=1",
    "KEY=VALUE,VALUE…": "seed=0,1", "[KEY=VALUE]…": "batch_size=8",
    "configs/X.yaml": "configs/faces_fader.yaml",
    "mini.yaml": "configs/faces_fader.yaml", "launch/accelerate/X.yaml": "launch/accelerate/cpu.yaml",
}  # fmt: skip
PROGRAMS = ("fader", "accelerate", "sbatch", "make")


def commands(text: str) -> list[str]:
    """The commands of the indented blocks, continued lines joined, comments and variables taken out."""
    blocks = re.sub(r"```.*?```", "", text, flags=re.S).replace("\\\n", " ")
    lines = [line.strip() for line in blocks.splitlines() if line.startswith("    ")]
    variables = {name: value for line in lines for name, value in re.findall(r'^(\w+)="([^"]*)"', line)}
    for name, value in variables.items():
        lines = [line.replace(f"${name}", value) for line in lines]
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [part for part in parts if part.split(" ")[0] in PROGRAMS]


def inline(text: str) -> list[str]:
    """The commands within sentences; `fader prepare` alone names a command and is none."""
    return [code for code in re.findall(r"`(fader [^`]+)`", " ".join(text.split())) if len(code.split()) > 2]


def words_of(command: str) -> list[str]:
    given = [word for word in shlex.split(command) if word != "…"]
    return [STAND_FOR.get(word, word) for word in given]


def read_by_its_parser(name: str, words: list[str]) -> None:
    """Raises what the command would say of words that it does not take."""
    module = importlib.import_module(f"launch.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(getattr(module, name))
    command = typer.main.get_command(app)
    context = command.make_context(f"fader {name}", list(words))
    if hasattr(command, "resolve_command") and context._protected_args:
        inner_name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        inner.make_context(inner_name, rest, parent=context)


def read_by_the_config(words: list[str], grid: bool = False) -> None:
    """Raises what the config would say of a file or of settings that it does not know."""
    files = [word for word in words if word.endswith(".yaml")]
    settings = [word for word in words if re.fullmatch(r"[a-z_.]+=.*", word)]
    if files and grid:
        sweep.plan(ROOT / files[0], settings)
    elif files:
        config.load(ROOT / files[0], settings)


def read(words: list[str]) -> None:
    """Read one command; an assertion or an error says what is wrong with it."""
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), f"the Makefile has no {rest[0]}"
    elif program == "fader":
        assert rest[0] in COMMANDS, f"there is no command {rest[0]}"
        read_by_its_parser(rest[0], rest[1:])
        read_by_the_config(rest[1:] if rest[0] in ("train", "sweep") else [], rest[0] == "sweep")
    else:
        ours = {"accelerate": r"launch/accelerate/\w+\.yaml", "sbatch": r"launch/slurm/\w+\.sbatch"}[program]
        (file,) = [word for word in rest if re.fullmatch(ours, word)]
        assert (ROOT / file).is_file(), f"there is no {file}"
        if program == "accelerate":
            module, *arguments = rest[rest.index("-m") + 1 :]
            read_by_its_parser(module.removeprefix("launch."), arguments)
        else:
            module, arguments = f"launch.{Path(file).stem}", rest[rest.index(file) + 1 :]
        read_by_the_config(arguments if module == "launch.train" else [])


TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
TYPED = [(page, command) for page, text in TEXTS.items() for command in commands(text)]
INLINE = [(page, command) for page, text in TEXTS.items() for command in inline(text)]


@pytest.mark.parametrize(("page", "command"), TYPED, ids=[f"{page}: {command}"[:70] for page, command in TYPED])
def test_a_command_that_is_not_run_can_be_typed(page, command):
    read(words_of(command))


@pytest.mark.parametrize(("page", "command"), INLINE, ids=[f"{page}: {command}"[:70] for page, command in INLINE])
def test_a_command_within_a_sentence_has_the_options_that_it_names(page, command):
    try:
        read(words_of(command))
    except Exception as error:
        if type(error).__name__ != "MissingParameter":  # a sentence may leave out what does not matter to it
            raise


def test_every_page_is_looked_at():
    assert {"README.md", "results.md", "distributed.md", "evaluation.md"} <= {page for page, _ in TYPED}


def test_what_is_fenced_as_bash_is_run():
    fenced = {page for page, text in TEXTS.items() if "```bash" in text}
    assert fenced == RUN.keys()
    for page, test in RUN.items():
        assert page in (ROOT / test).read_text(), f"{test} does not run {page}"


@pytest.mark.parametrize(
    "command",
    [
        "fader trian configs/faces_fader.yaml",
        "fader evaluate RUN --judgement JUDGE",
        "fader evaluate",
        "fader train configs/faces_fader.yaml method.latent.wieght=1",
        "fader sweep configs/none.yaml method.latent.weight=0,1",
        "accelerate launch --config_file launch/accelerate/none.yaml -m launch.train configs/faces_fader.yaml",
        "accelerate launch --config_file launch/accelerate/cpu.yaml -m launch.evaluate RUN --judgement J",
        "sbatch launch/slurm/train.sbatch configs/faces_fader.yaml bach_size=3",
        "fader bench data --sise 3",
        "make everything",
    ],
)
def test_a_command_that_cannot_be_typed_is_seen(command):
    with pytest.raises(Exception, match=r"(?i)no |unknown|missing|there is"):
        read(words_of(command))
