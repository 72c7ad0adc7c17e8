"""A reading as lines of a terminal, whatever its width. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from loraplex.cli.terminal import printable
from loraplex.cli.top.reading import (
    BETWEEN_TOKENS,
    TTFT,
    Window,
    adapters_by_tier,
    quantiles,
    uses,
)
from loraplex.types import PageHolder

#: Of each use of pages: its word, the letter of the map, and the letter's style.
_USES = {
    "kv": ("sequences", "#", "bold green"),
    "prefix_used": ("prefixes in use", "=", "cyan"),
    "prefix_idle": ("idle prefixes", "-", "blue"),
    "adapters": ("adapters", "A", "magenta"),
    "free": ("free", ".", "dim"),
}
_MIN_COLUMNS, _LABEL_COLUMNS = 40, 10
_NAME_COLUMNS, _STATE_COLUMNS, _NUMBER_COLUMNS = 20, 10, 9


@dataclass(frozen=True)
class Notice:
    """What is said beside the numbers: where they are from, and what is wrong."""

    base_url: str
    status: str = ""
    problem: str = ""


def render(window: Window, notice: Notice, *, columns: int, lines: int | None) -> RenderableType:
    """Return the whole view.

    Args:
        window: What happened lately, and what is now.
        notice: See `Notice`.
        columns: No line is longer; under 40 the terminal cuts them.
        lines: How many there may be; None for all.
    """
    columns = max(columns, _MIN_COLUMNS)
    shown = [*_head(notice, columns), *_pool(window, columns), *_numbers(window, columns)]
    shown += _adapters(window, columns, None if lines is None else lines - len(shown))
    for line in shown:
        line.truncate(columns, overflow="ellipsis")
    return Group(*shown[:lines])


def _head(notice: Notice, columns: int) -> Iterator[Text]:
    line = Text.assemble(("loraplex top", "bold"), f"  {notice.base_url}  {notice.status}")
    yield line
    for part in wrap(printable(notice.problem), columns):
        yield Text(part, style="bold red")


def _pool(window: Window, columns: int) -> Iterator[Text]:
    pool = window.end.pool
    taken = pool.num_pages - pool.free - pool.prefix_idle
    share = taken / pool.num_pages if pool.num_pages else 0.0
    size = f"{pool.num_pages} pages of {decimal(pool.page_bytes)}"
    yield from _line("pool", [size, f"{share:.0%} in use"], columns)
    counts = [count for _, count in uses(window.end)]
    yield _map(counts, columns)
    legend = Text()
    for (word, letter, style), count in zip(_USES.values(), counts, strict=True):
        entry = f" {word} {count / (pool.num_pages or 1):.0%}"
        if legend and len(legend) + len(entry) + 3 > columns:
            yield legend
            legend = Text()
        legend.append("  " if legend else "")
        legend.append(letter, style)
        legend.append(entry)
    yield legend


def _map(counts: Sequence[int], columns: int) -> Text:
    """Return the pool as one line of `columns`; what has any page has a letter."""
    total = sum(counts) or 1
    widths = [max(round(count * columns / total), 1 if count else 0) for count in counts]
    # Rounding, and the letters of what is hardly there, come off the widest.
    widths[widths.index(max(widths))] += columns - sum(widths)
    line = Text()
    for (_, letter, style), width in zip(_USES.values(), widths, strict=True):
        line.append(letter * width, style)
    return line


def _numbers(window: Window, columns: int) -> Iterator[Text]:
    end, host = window.end, window.end.pool.host
    tiers = adapters_by_tier(end.pool)
    in_host = f"{tiers['host_only']} in host memory alone"
    if host.capacity_bytes:
        in_host += f" ({decimal(host.bytes)} of {decimal(host.capacity_bytes)} taken)"
    running, waiting = (end.gauge(f"loraplex_requests_{x}") for x in ("running", "waiting"))
    finished, refused, preempted, out, into = (
        _per_s(window.rate(f"loraplex_{counter}_total"))
        for counter in (
            "requests_finished",
            "requests_rejected",
            "preemptions",
            "generated_tokens",
            "prompt_tokens",
        )
    )
    hits = window.share("loraplex_prefix_hit_tokens_total", "loraplex_prefix_query_tokens_total")
    cached = [] if hits is None else [f"{hits:.0%} of prompts cached"]
    rows = {
        "adapters": [f"{tiers['pool']} in the pool", f"{tiers['loading']} loading", in_host],
        "requests": [f"{running:.0f} running", f"{waiting:.0f} waiting", f"{finished} finished"],
        "pressure": [f"{refused} rejected", f"{preempted} preempted"],
        "tokens": [f"{out} generated", f"{into} of prompts", *cached],
        "TTFT": _quantiles(window, TTFT),
        "per token": _quantiles(window, BETWEEN_TOKENS),
    }
    for label, pieces in rows.items():
        yield from _line(label, pieces, columns)


def _adapters(window: Window, columns: int, room: int | None) -> Iterator[Text]:
    holders = window.end.pool.by_adapter
    if not holders or (room is not None and room < 3):
        return
    rows = [_row(window, holder) for holder in sorted(holders, key=lambda h: _rank(window, h))]
    shown = rows if room is None else rows[: room - 2]
    # On a narrow terminal the columns on the right go first.
    num_cells = 2 + max(0, min(4, (columns - _NAME_COLUMNS - _STATE_COLUMNS) // _NUMBER_COLUMNS))
    width = columns - _STATE_COLUMNS - (num_cells - 2) * _NUMBER_COLUMNS
    yield Text("")
    head = ("ADAPTER", "STATE", "WEIGHTS", "PREFIXES", "REQ/S", "TOK/S")
    yield _cells(head[:num_cells], width, "bold")
    for row in shown:
        yield _cells(row[:num_cells], width)


def _rank(window: Window, holder: PageHolder) -> tuple[float, int]:
    busy = window.growth("loraplex_adapter_generated_tokens_total", adapter=holder.name or "")
    return -busy, -((holder.weight_pages or 0) + holder.prefix_pages)


def _row(window: Window, holder: PageHolder) -> tuple[str, ...]:
    name = holder.name or holder.id or "-"
    has_rates = "loraplex_adapter_requests_total" in window.end.metrics.families
    rates = [
        _number(window.rate(f"loraplex_adapter_{what}_total", adapter=name)) if has_rates else "-"
        for what in ("requests", "generated_tokens")
    ]
    weights = "-" if holder.weight_pages is None else str(holder.weight_pages)
    return (printable(name), holder.state, weights, str(holder.prefix_pages), *rates)


def _cells(row: Sequence[str], name_columns: int, style: str = "") -> Text:
    name = Text(row[0])
    name.truncate(name_columns, overflow="ellipsis", pad=True)
    numbers = "".join(f"{cell:>{_NUMBER_COLUMNS}}" for cell in row[2:])
    rest = f" {row[1]:<{_STATE_COLUMNS - 1}}{numbers}"
    return Text.assemble(name, rest, style=style)


def _line(label: str, pieces: Sequence[str], columns: int) -> Iterator[Text]:
    """Yield a label and what is told under it, on as many lines as it takes."""
    line = Text.assemble((f"{label:<{_LABEL_COLUMNS}}", "bold"))
    for index, piece in enumerate(pieces):
        told = piece if index == len(pieces) - 1 else f"{piece}, "
        if index and len(line) + len(told.rstrip()) > columns:
            line.rstrip()
            yield line
            line = Text(" " * _LABEL_COLUMNS)
        line.append(told)
    yield line


def _quantiles(window: Window, name: str) -> list[str]:
    histogram = window.histogram(name)
    if not histogram.count:
        return [f"nothing in the last {window.seconds:.2g} s"]
    found = quantiles(histogram)
    told = [f"{q} {_seconds(found[q])}" for q in ("p50", "p90", "p99")]
    return [*told, f"of {histogram.count:.0f}"]


def _seconds(value: object) -> str:
    if not isinstance(value, float):
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.2g}"


def _per_s(value: float | None) -> str:
    return f"{_number(value)}/s"
