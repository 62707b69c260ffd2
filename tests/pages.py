"""README.md and docs/ as the tests read them: code blocks, links, headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from prosparse_cupy.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(?:^(?P<before>(?!```)\S.*)\n+)?^```(?P<language>\w*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first line of code, from 0."""
    before: str
    """The line of text right before it."""
    language: str
    code: str

    @property
    def needs(self) -> str:
        """What it needs to run: "gpu", "engine" (a serving engine), "torchrun", "torch", or nothing more than NumPy."""
        if "needs vLLM" in self.before or "needs SGLang" in self.before:
            return "engine"
        if "needs a CUDA GPU" in self.before:
            return "gpu"
        if "torchrun" in self.code:
            return "torchrun"
        return "torch" if re.search(r"\btorch\b", self.code) else "numpy"

    def run(self, names: dict[str, Any]) -> None:
        """In the namespace `names`; errors name the page and its line."""
        families = [*FAMILIES]
        try:
            exec(compile("\n" * self.line + self.code, self.page, "exec"), names)
        finally:  # what a page registers is the page's
            FAMILIES[:] = families


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("code")), found["before"] or "", found["language"], found["code"])
        for found in _BLOCK.finditer(text)
    ]


def python_blocks(page: Path) -> list[Block]:
    """Those of Python, in order."""
    return [block for block in blocks(page) if block.language == "python"]


def relative_links(page: Path) -> list[str]:
    """Targets of links and images that are no URLs."""
    return [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may name, as GitHub and MkDocs make it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
