"""How the commands write: tables for people, tab-separated lines and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from loraplex.types import ApiModel

# What a model writes is text, never an order to the terminal.
_CONTROLS = dict.fromkeys(
    code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
)

_WORD_COLUMNS = 16


def stdout() -> Console:
    """Return a console for results."""
    return Console(highlight=False)


def stderr() -> Console:
    """Return a console for everything that is not the result: progress, notes, errors."""
    return Console(stderr=True, highlight=False)


def printable(text: str) -> str:
    """Return text without control characters, which could move the cursor or worse."""
    return text.translate(_CONTROLS)


def write(console: Console, text: str, *, style: str | None = None, end: str = "\n") -> None:
    """Write text as it is: no markup, no wrapping, no control characters."""
    # A segment and no `Text`, which would turn the tabs of code and of tables into spaces.
    segment = Segment(printable(text) + end, console.get_style(style) if style else None)
    console.print(Segments([segment]), end="", soft_wrap=True)


def write_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table; tab-separated lines under one line of names when piped."""
    console = stdout()
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not console.is_terminal:
        for line in [[name.lower() for name in columns], *cells]:
            write(console, "\t".join(line))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for name, is_whole in zip(columns, _kept_whole(widths, console.width), strict=True):
        table.add_column(name, overflow="fold", no_wrap=is_whole)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)


def _kept_whole(widths: Sequence[int], room: int) -> list[bool]:
    """Say which columns never break: words and times, if that leaves the long ones some room."""
    whole = [width <= _WORD_COLUMNS for width in widths]
    taken = sum(width if short else 8 for width, short in zip(widths, whole, strict=True))
    return [short and taken + len(widths) <= room for short in whole]


def write_json(value: ApiModel | Sequence[ApiModel]) -> None:
    """Write answers as the server gave them."""
    if isinstance(value, ApiModel):
        data: object = value.model_dump(mode="json")
    else:
        data = [item.model_dump(mode="json") for item in value]
    write(stdout(), json.dumps(data, indent=2))
