"""What was changed of names, written down in the transaction that changes it, for other servers.

Ids have no gaps and are given in the order of the commits: whoever has read up to one has missed
nothing before it, and whoever does not find the next one was away for longer than rows are kept. A
sequence of the database would promise neither: a transaction that began earlier may end later.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select

from loraplex_server.adapters.registry_tables import name_changes

#: A server that was cut off for longer looks everything up again.
KEEP_CHANGES_S: Final = 3600
_ORDER: Final = "changes"


@dataclass(frozen=True)
class NameChange:
    """A name stands for something else, for nothing, or has other settings.

    Attributes:
        scope: of the base that the name belongs to.
        removed: ids of adapters that were versions of the name, and are no more.
        gone: those that no name of any base stands for now.
        cancels: whatever runs on what was removed is to be ended.
        change_id: counts up; 0 of one that is not written yet.
    """

    scope: str
    name: str
    removed: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    cancels: bool = False
    change_id: int = 0


def lock_for_transaction(connection: Connection, what: str) -> None:
    """Let nobody else lock the same until the transaction ends; SQLite's writers are alone."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))


def note_change(connection: Connection, change: NameChange, now: int) -> None:
    """Write a change down: the last thing in its transaction, as others wait from here on.

    Args:
        now: Unix seconds.
    """
    lock_for_transaction(connection, _ORDER)
    connection.execute(
        insert(name_changes).values(
            id=last_change_id(connection) + 1,
            scope=change.scope,
            name=change.name,
            removed=_to_json(change.removed),
            gone=_to_json(change.gone),
            cancels=change.cancels,
            time=now,
        )
    )


def last_change_id(connection: Connection) -> int:
    """Return the id of the latest change; 0 before the first one."""
    return int(connection.execute(select(func.max(name_changes.c.id))).scalar() or 0)


def read_changes(connection: Connection, after: int, limit: int) -> list[NameChange]:
    """Return up to `limit` changes behind the id `after`, in their order."""
    query = select(name_changes).where(name_changes.c.id > after)
    return [
        NameChange(
            scope=row.scope,
            name=row.name,
            removed=frozenset(json.loads(row.removed)),
            gone=frozenset(json.loads(row.gone)),
            cancels=row.cancels,
            change_id=row.id,
        )
        for row in connection.execute(query.order_by(name_changes.c.id).limit(limit))
    ]


def prune_changes(connection: Connection, now: int) -> None:
    """Delete old changes, but for the last one, from which ids go on."""
    last = select(func.max(name_changes.c.id)).scalar_subquery()
    is_old = name_changes.c.time < now - KEEP_CHANGES_S
    connection.execute(delete(name_changes).where(is_old, name_changes.c.id < last))


def _to_json(ids: Collection[str]) -> str:
    return json.dumps(sorted(ids))
