"""Links of the README and of the site's pages lead somewhere, headings included, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, prose

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#{1,6} (.+)$", prose(page), re.M)
    words = [re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in _anchors(target), f"{link}: {target.name} has no such heading"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page != ROOT / "README.md":
            assert f"- {page.relative_to(ROOT / 'docs')}" in navigation, f"mkdocs.yml: nav lacks {page.name}"
