"""`loraplex adapters versions` and `rollback`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from loraplex.cli.adapters import Name, time_of
from loraplex.cli.models import AsJson
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stdout, write, write_json, write_table


def versions(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """List the versions of an adapter, newest first."""
    with open_client(ctx) as client:
        found = list(client.adapters.versions(name))
    if as_json:
        write_json(found)
        return
    rows = [
        (
            v.version,
            "yes" if v.current else "no",
            v.id,
            decimal(v.size_bytes),
            time_of(v.created),
            v.source,
        )
        for v in found
    ]
    write_table(("VERSION", "CURRENT", "ID", "SIZE", "CREATED", "SOURCE"), rows)


def rollback(
    ctx: typer.Context,
    name: Name,
    to: Annotated[
        str, typer.Argument(help="The number of a version, or its id.", metavar="VERSION")
    ],
) -> None:
    """Let a name stand for another of its versions."""
    with open_client(ctx) as client:
        if to.isascii() and to.isdigit():
            adapter = client.adapters.rollback(name, version=int(to))
        else:
            adapter = client.adapters.rollback(name, adapter_id=to)
    write(stdout(), f"{adapter.name} stands for version {adapter.version}, {adapter.id}")
