"""What tenants used of each adapter, by the hour, in the database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, delete, func, literal, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.tenant_tables import usage, usage_writers
from loraplex_server.tenants.errors import InvalidCursor

HOUR_S: Final = 3600
_DAY_S: Final = 24 * HOUR_S
#: A process that has written nothing for so long is gone, and its batches are settled.
_WRITER_S: Final = 7 * _DAY_S
_AMOUNTS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


class Amounts(NamedTuple):
    """What was used."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: Amounts) -> Amounts:
        return Amounts(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Amounts) -> Amounts:
        return Amounts(*(a - b for a, b in zip(self, other, strict=True)))


class Account(NamedTuple):
    """Whose use of what, in the hour that begins at this Unix time; adapter "" is the base."""

    hour: int
    tenant: str
    adapter: str


@dataclass(frozen=True)
class UsageQuery:
    """What to report.

    Attributes:
        start, end: Unix seconds, widened to whole hours; None for no bound.
        bucket_s: sum over so many seconds, aligned to the epoch; None for all of them.
        tenant, adapters: only of these; None for all.
    """

    start: int | None = None
    end: int | None = None
    bucket_s: int | None = HOUR_S
    tenant: str | None = None
    adapters: tuple[str, ...] | None = None


class UsageRow(NamedTuple):
    """One line of a report.

    Attributes:
        start, end: Unix seconds.
        cursor: what a page that ends with it is continued by.
    """

    start: int
    end: int
    tenant: str
    adapter: str
    amounts: Amounts
    cursor: str


class UsageStore:
    """Stateless; every method blocks and may be called from any thread. Raises StorageFailed."""

    def __init__(self, database: Engine, scope: str) -> None:
        self._database = database
        self._scope = scope

    def add(self, writer_id: str, batch: int, used: Mapping[Account, Amounts], now: int) -> None:
        """Add what was used; a batch that was added before changes nothing.

        Args:
            writer_id: of the process; its batches come one after another, counted from 1.
        """
        with storage_errors("note usage"), self._database.begin() as connection:
            if not _take_turn(connection, writer_id, batch, now):
                return  # it was committed, and the news of it was lost
            # In one order everywhere, or two servers could wait for each other's rows.
            rows = [
                {"scope": self._scope, **account._asdict(), **used[account]._asdict()}
                for account in sorted(used)
            ]
            insert = _dialect(connection).insert(usage)
            sums = {name: usage.c[name] + insert.excluded[name] for name in _AMOUNTS}
            keys = list(usage.primary_key)
            connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=sums), rows)
            if batch == 1:
                old = usage_writers.c.written < now - _WRITER_S
                connection.execute(delete(usage_writers).where(old))

    def report(self, query: UsageQuery, *, limit: int, after: str | None = None) -> list[UsageRow]:
        """Return up to `limit` sums behind `after`, by time, tenant and adapter."""
        start = (
            literal(0) if query.bucket_s is None else usage.c.hour - usage.c.hour % query.bucket_s
        )
        sums = [func.sum(usage.c[name]).label(name) for name in _AMOUNTS]
        ends = func.max(usage.c.hour).label("last_hour")
        begins = func.min(usage.c.hour).label("first_hour")
        groups = [start.label("start"), usage.c.tenant, usage.c.adapter]
        inner = select(*groups, *sums, begins, ends).where(usage.c.scope == self._scope)
        for condition in _conditions(query):
            inner = inner.where(condition)
        found = inner.group_by(*groups[1:] if query.bucket_s is None else groups).subquery()
        order = [found.c.start, found.c.tenant, found.c.adapter]
        outer = select(found).order_by(*order).limit(limit)
        if after is not None:
            outer = outer.where(tuple_(*order) > tuple_(*map(literal, _parse_cursor(after))))
        with storage_errors("read usage"), self._database.connect() as connection:
            return [_row(row, query) for row in connection.execute(outer)]


def _conditions(query: UsageQuery) -> list[Any]:
    found = []
    if query.start is not None:
        found.append(usage.c.hour >= query.start - query.start % HOUR_S)
    if query.end is not None:
        found.append(usage.c.hour < query.end)
    if query.tenant is not None:
        found.append(usage.c.tenant == query.tenant)
    if query.adapters is not None:
        found.append(usage.c.adapter.in_(query.adapters))
    return found


def _row(row: Any, query: UsageQuery) -> UsageRow:
    amounts = Amounts(*(int(getattr(row, name)) for name in _AMOUNTS))
    start, end = row.first_hour, row.last_hour + HOUR_S
    if query.bucket_s is not None:
        start, end = row.start, row.start + query.bucket_s
    cursor = f"{row.start}|{row.tenant}|{row.adapter}"
    return UsageRow(start, end, row.tenant, row.adapter, amounts, cursor)


def _parse_cursor(cursor: str) -> tuple[int, str, str]:
    start, *names = cursor.split("|")
    if len(names) != 2 or not (start.isascii() and start.isdigit() and len(start) < 16):
        raise InvalidCursor(cursor)
    return int(start), names[0], names[1]


def _take_turn(connection: Connection, writer_id: str, batch: int, now: int) -> bool:
    """Whether the batch is the writer's next; from here on it has been."""
    insert = _dialect(connection).insert(usage_writers)
    statement = insert.values(id=writer_id, last_batch=batch, written=now).on_conflict_do_update(
        index_elements=["id"],
        set_={"last_batch": batch, "written": now},
        where=usage_writers.c.last_batch < batch,
    )
    return connection.execute(statement.returning(usage_writers.c.id)).first() is not None


def _dialect(connection: Connection) -> Any:
    return postgresql if connection.dialect.name == "postgresql" else sqlite
