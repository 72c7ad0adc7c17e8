"""Registries of earlier releases, brought to the schema of today inside one transaction.

1   adapters(id, ranks, size_bytes), names(scope, name, adapter_id, base_model, created)
2   `ranks` became `spec`, and files and ids those of format 2
3   names have versions and settings; see `registry_tables`
4   names have owners and readers; keys, usage and audit, see `tenant_tables`
5   changes are written down for other servers: one more table, which all others are made with
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, text

from loraplex_server.adapters.registry_tables import metadata


@dataclass(frozen=True)
class UpgradedBlob:
    """A file of format 1 written again in format 2."""

    adapter_id: str
    size_bytes: int


#: Takes the id of a file of format 1; None where there is no such file any more.
BlobUpgrade = Callable[[str], UpgradedBlob | None]


def migrate_from_1(connection: Connection, upgrade_blob: BlobUpgrade) -> None:
    """Write each adapter's file again and give it its new id; names stay.

    A name whose file is gone could not be served before and is dropped. Files of both formats lie
    side by side until the transaction has ended; the sweep after it takes the old ones.
    """
    rows = connection.execute(text("SELECT id, ranks FROM adapters")).all()
    connection.execute(text("PRAGMA defer_foreign_keys = ON"))
    connection.execute(text("ALTER TABLE adapters RENAME COLUMN ranks TO spec"))
    for old_id, ranks in rows:
        new = upgrade_blob(old_id)
        if new is None:
            connection.execute(text("DELETE FROM names WHERE adapter_id = :id"), {"id": old_id})
            connection.execute(text("DELETE FROM adapters WHERE id = :id"), {"id": old_id})
            continue
        values = {
            "old": old_id,
            "new": new.adapter_id,
            "spec": json.dumps({"ranks": json.loads(ranks)}),
            "size": new.size_bytes,
        }
        connection.execute(
            text("UPDATE adapters SET id = :new, spec = :spec, size_bytes = :size WHERE id = :old"),
            values,
        )
        connection.execute(
            text("UPDATE names SET adapter_id = :new WHERE adapter_id = :old"), values
        )


def migrate_from_2(connection: Connection) -> None:
    """Make each name's adapter its version 1."""
    for table in ("adapters", "names"):
        connection.execute(text(f"ALTER TABLE {table} RENAME TO {table}_2"))
    connection.execute(text("DROP INDEX IF EXISTS ix_names_adapter_id"))
    metadata.create_all(connection)
    connection.execute(
        text(
            "INSERT INTO adapters (id, spec, size_bytes, native_bytes) "
            "SELECT id, spec, size_bytes, 0 FROM adapters_2"
        )
    )
    connection.execute(
        text(
            "INSERT INTO names (scope, name, current, last_version, active, pinned, defaults) "
            "SELECT scope, name, 1, 1, created, false, '{}' FROM names_2"
        )
    )
    connection.execute(
        text(
            "INSERT INTO versions (scope, name, version, adapter_id, base_model, created, source, "
            "report) SELECT scope, name, 1, adapter_id, base_model, created, 'upload', '[]' "
            "FROM names_2"
        )
    )
    for table in ("names_2", "adapters_2"):
        connection.execute(text(f"DROP TABLE {table}"))


def migrate_from_3(connection: Connection) -> None:
    """Give names an owner, nobody; the tables of tenants are made with all others.

    A server of the release before that still runs on the database goes on: it never says who owns
    a name, and nobody does.
    """
    connection.execute(text("ALTER TABLE names ADD COLUMN owner VARCHAR DEFAULT '' NOT NULL"))
    connection.execute(text("ALTER TABLE names ADD COLUMN readers TEXT"))
    connection.execute(text("CREATE INDEX names_owned ON names (scope, owner)"))
