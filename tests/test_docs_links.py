"""Every file that a page names is there, every link leads somewhere, and no page names this or that machine's folders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.md")])
FILES = r"(?:fader|pipeline|launch|tests|configs|docs)/[\w./-]*\.(?:py|md|sbatch|json|png)"  # a config of the reader's is none


def prose(page: Path) -> str:
    """A page without its blocks of code and commands, whose brackets are no links."""
    text = re.sub(r"```(?:python|yaml|bash).*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def headings(page: Path) -> set[str]:
    """What a link to a heading is called."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_every_named_file_is_there(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name} links to {target}, which is not there"
            assert not heading or heading in headings(file), f"{page.name} links to {target}, which has no such heading"
    if page.name != "log.md":  # it tells of files that were
        missing = [file for file in re.findall(rf"(?<![\w/.]){FILES}", text) if not (ROOT / file).exists()]
        assert not missing, f"{page.name} names files that are not there: {missing}"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", prose(page))
        new = {(page.parent / link).resolve() for link in links if not link.startswith("http")} - reached
        reached |= new
        waiting += new
    assert {path.resolve() for path in (ROOT / "docs").glob("*.md")} <= reached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_folder_of_one_machine(page):
    assert not re.search(r"(?<![\w.])/(?:work|tmp|root|home)/|\.\./(?:shared|experiments|data)\b", page.read_text(encoding="utf-8"))
