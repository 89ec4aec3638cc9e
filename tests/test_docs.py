"""Pages link to files and headings that are there, and the index of the docs names every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sqap

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "reference" / "README.md",
    ROOT / "integrations" / "lerobot" / "README.md",
]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def links(page: Path) -> list[str]:
    """Targets of a page's links that are not of the web, outside of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [target for target in LINK.findall(text) if not target.startswith(("http:", "https:", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        found = page if not name else page.parent / name
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(found), f"{target}: there is no such heading"


def test_the_index_names_every_page() -> None:
    named = {(INDEX.parent / target).resolve() for target in links(INDEX)}
    missing = {page for page in (ROOT / "docs").rglob("*.md") if page != INDEX} - named
    assert not missing


def test_the_changelog_has_this_version() -> None:
    assert f"## [{sqap.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
