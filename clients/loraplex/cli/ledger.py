"""`loraplex usage` and `loraplex audit`: what was used, and who changed what."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Annotated

import typer

from loraplex.cli.adapters import time_of
from loraplex.cli.models import AsJson
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stderr, write, write_json, write_table
from loraplex.errors import UsageError

Tenant = Annotated[str | None, typer.Option(help="Of this tenant only.")]
Limit = Annotated[int, typer.Option(min=1, help="Show so many at most.")]


class BucketName(StrEnum):
    """How long the time of one line is."""

    HOUR = "hour"
    DAY = "day"
    ALL = "all"


def usage(
    ctx: typer.Context,
    since: Annotated[
        str | None, typer.Option(help="From this day or time: 2026-05-01, 2026-05-01T08:00.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Up to this day or time.")] = None,
    per: Annotated[BucketName, typer.Option(help="One line per hour, day, or all of it.")] = (
        BucketName.ALL
    ),
    tenant: Tenant = None,
    adapter: Annotated[str | None, typer.Option(help="Of this adapter only.")] = None,
    limit: Limit = 1000,
    as_json: AsJson = False,
) -> None:
    """Show what tenants used of which adapters."""
    with open_client(ctx) as client:
        records = client.usage.list(
            start=_unix_s("--since", since),
            end=_unix_s("--until", until),
            bucket=per.value,
            tenant=tenant,
            adapter=adapter,
        )
        found = list(islice(records, limit + 1))
    shown = found[:limit]
    if as_json:
        write_json(shown)
    else:
        rows = [
            (
                time_of(r.start),
                time_of(r.end),
                r.tenant or "-",
                "(base)" if r.adapter is None else r.adapter,
                r.requests,
                r.prompt_tokens,
                r.cached_tokens,
                r.completion_tokens,
            )
            for r in shown
        ]
        names = ("FROM", "TO", "TENANT", "ADAPTER", "REQUESTS", "PROMPT", "CACHED", "OUTPUT")
        write_table(names, rows)
    _tell_of_more(len(found) > limit)


def audit(
    ctx: typer.Context,
    tenant: Tenant = None,
    subject: Annotated[
        str | None, typer.Option(help="Of this adapter or this key's id only.")
    ] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """Show who changed adapters and keys."""
    with open_client(ctx) as client:
        found = list(islice(client.audit.list(tenant=tenant, subject=subject), limit + 1))
    shown = found[:limit]
    if as_json:
        write_json(shown)
    else:
        rows = [
            (
                time_of(int(e.time)),
                e.actor,
                e.tenant or "-",
                e.action,
                e.subject,
                e.request_id or "-",
            )
            for e in shown
        ]
        write_table(("TIME", "ACTOR", "TENANT", "ACTION", "SUBJECT", "REQUEST"), rows)
    _tell_of_more(len(found) > limit)


def _tell_of_more(has_more: bool) -> None:
    if has_more:
        write(stderr(), "there are more: raise --limit", style="dim")


def _unix_s(option: str, text: str | None) -> int | None:
    """Read a day or a time of this machine's time zone."""
    if text is None:
        return None
    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp())
    except ValueError as error:
        raise UsageError(
            f"{option} is a day or a time such as 2026-05-01T08:00: {error}"
        ) from error
