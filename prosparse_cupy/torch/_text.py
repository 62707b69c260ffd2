"""Tables as plain text, for reports."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A title and a table under it."""
    drawn = Table()
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(drawn)
    return f"{title}\n{text.getvalue().rstrip()}"
