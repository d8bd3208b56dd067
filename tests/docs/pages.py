"""What the README and the pages of the site hold: blocks of code, each with what its marker says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<language>[\w-]*)")
_MARKER = re.compile(r"^\s*<!-- (?P<text>.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: The file that it stands in.
        line: Its number there.
        language: What follows the fence.
        marker: The comment right before it, or nothing. ``not run: WHY`` leaves it out; ``command: NAME`` is one that
            .ci/run runs, ``tested by FILE`` one that a test of its own runs; ``file: NAME`` is written into the page's
            folder before commands are run there; ``run together`` starts all its commands at once.
        code: What is between the fences.
    """

    page: Path
    line: int
    language: str
    marker: str
    code: str

    @property
    def name(self) -> str:
        """Where it stands, for people."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def says(self, word: str) -> str | None:
        """What its marker says after a word, or None."""
        found = re.match(rf"{word}(?::\s*|\s+|$)(.*)", self.marker)
        return None if found is None else found[1]


def read_blocks(page: Path) -> Iterator[Block]:
    """Read the blocks of a page, in order."""
    marker, fence, start, block = "", None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence is not None:
            if line.strip() == fence["fence"]:
                indent = len(fence["indent"])
                code = "\n".join(text[indent:] for text in block)
                yield Block(page, start, fence["language"], marker, code)
                marker, fence = "", None
            else:
                block.append(line)
        elif found := _FENCE.match(line):
            fence, start, block = found, number, []
        elif found := _MARKER.match(line):
            marker = found["text"]
        elif line.strip():
            marker = ""
    assert fence is None, f"{page}:{start}: the block does not end"


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages; of all, if none is named."""
    found = [block for page in PAGES for block in read_blocks(page)]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)(```+).*?^\1\2\s*$", "", page.read_text(), flags=re.S | re.M)


def inline(page: Path) -> list[str]:
    """What stands between single backquotes on a page."""
    return [" ".join(text.split()) for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]
