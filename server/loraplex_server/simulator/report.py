"""What an experiment found: tables and checks, as text and as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None
Row = list[Cell]


@dataclass(frozen=True)
class Table:
    """Rows of figures under a title."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[Row]

    def text(self) -> str:
        """Return the table for a terminal, numbers to the right."""
        cells = [[_text(cell) for cell in row] for row in self.rows]
        widths = [
            max([len(header), *(len(row[i]) for row in cells)])
            for i, header in enumerate(self.headers)
        ]
        is_number = [
            all(not isinstance(row[i], str) for row in self.rows) for i in range(len(widths))
        ]

        def line(row: Sequence[str]) -> str:
            aligned = (
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, is_number, strict=True)
            )
            return "  ".join(aligned).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, line(self.headers), rule, *map(line, cells)])


@dataclass(frozen=True)
class Check:
    """A figure and what it must be."""

    what: str
    value: float
    target: float
    is_at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.target if self.is_at_most else self.value >= self.target

    def text(self) -> str:
        bound = "at most" if self.is_at_most else "at least"
        verdict = "met" if self.holds else "NOT MET"
        return f"{verdict:8}{self.what}: {_text(self.value)} ({bound} {_text(self.target)})"


@dataclass(frozen=True)
class Report:
    """One experiment's result.

    Attributes:
        parameters: everything that decides the result, the seed included.
        plots: figures by file name, drawn only when asked for.
    """

    experiment: str
    parameters: dict[str, Any]
    tables: list[Table]
    checks: list[Check] = field(default_factory=list)
    plots: dict[str, Callable[[], Figure]] = field(default_factory=dict)

    def text(self) -> str:
        """Return the whole report for a terminal."""
        stated = "  ".join(f"{name}={value}" for name, value in self.parameters.items())
        parts = [f"{self.experiment}: {stated}", *(table.text() for table in self.tables)]
        if self.checks:
            parts.append("\n".join(check.text() for check in self.checks))
        return "\n\n".join(parts)

    def json_line(self) -> str:
        """Return the whole report as one line of JSON."""
        return json.dumps(
            {
                "experiment": self.experiment,
                "version": version("loraplex"),
                "parameters": self.parameters,
                "tables": [
                    {
                        "title": table.title,
                        "headers": table.headers,
                        "rows": [[_known(cell) for cell in row] for row in table.rows],
                    }
                    for table in self.tables
                ],
                "checks": [
                    {
                        "what": check.what,
                        "value": _known(check.value),
                        "target": check.target,
                        "holds": check.holds,
                    }
                    for check in self.checks
                ],
            },
            default=str,
        )


def _known(cell: Cell) -> Cell:
    """Return None for "not a number", which JSON has no word for."""
    return None if cell != cell else cell


def _text(cell: Cell) -> str:
    if cell is None or cell != cell:  # NaN is unlike itself
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.1f}"
    return str(cell)
