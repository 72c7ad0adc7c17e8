"""`loraplex pool`: the server's memory as a map for people."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from loraplex.cli.models import AsJson
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stdout, write, write_json, write_table
from loraplex.types import PageHolder, Pool

_BAR_CHARS = 40

Top = Annotated[int, typer.Option(min=0, help="Show so many adapters; 0 shows all.")]


def pool(ctx: typer.Context, as_json: AsJson = False, top: Top = 20) -> None:
    """Show who holds the pages of the server's memory pool."""
    with open_client(ctx) as client:
        found = client.pool()
    if as_json:
        write_json(found)
        return
    write_table(
        ("USE", "PAGES", "SIZE", "SHARE", "MAP"), [_use(found, *use) for use in _uses(found)]
    )
    write(stdout(), "")
    shown = found.by_adapter[: top or None]
    if shown:
        write_table(("ADAPTER", "STATE", "WEIGHTS", "PREFIXES"), map(_holder, shown))
    if left := len(found.by_adapter) - len(shown):
        write(stdout(), f"... and {left} more (--top 0 shows all)")
    write(stdout(), _host_line(found))


def _uses(pool: Pool) -> list[tuple[str, int]]:
    return [
        ("running sequences", pool.kv),
        ("prefixes in use", pool.prefix_used),
        ("prefixes, idle", pool.prefix_idle),
        ("adapters", pool.adapters),
        ("free", pool.free),
    ]


def _use(pool: Pool, label: str, pages: int) -> tuple[object, ...]:
    share = pages / pool.num_pages if pool.num_pages else 0.0
    bar = "#" * round(share * _BAR_CHARS)
    return label, pages, decimal(pages * pool.page_bytes), f"{share:.1%}", bar


def _holder(holder: PageHolder) -> tuple[object, ...]:
    weights = "-" if holder.weight_pages is None else holder.weight_pages
    return holder.name or holder.id or "-", holder.state, weights, holder.prefix_pages


def _host_line(pool: Pool) -> str:
    host = pool.host
    if not host.capacity_bytes:
        return "host memory keeps no adapters"
    return (
        f"host memory: {len(host.adapters)} adapters, "
        f"{decimal(host.bytes)} of {decimal(host.capacity_bytes)}"
    )
