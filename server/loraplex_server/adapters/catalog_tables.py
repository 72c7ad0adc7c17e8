"""The catalogue's database: names, and the immutable adapters they stand for.

A name belongs to one base model (`scope`), so one data folder can serve another base later
without ever offering it adapters of the first. What depends on settings (pages) is not stored.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import ModelGeometry
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.spec_json import decode_spec, encode_spec

_SCHEMA_VERSION: Final = 2
_BUSY_TIMEOUT_S: Final = 10.0

_metadata = MetaData()

adapters: Final = Table(
    "adapters",
    _metadata,
    Column("id", String, primary_key=True),
    Column("spec", String, nullable=False),
    Column("size_bytes", Integer, nullable=False),
)

names: Final = Table(
    "names",
    _metadata,
    Column("scope", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("adapter_id", String, ForeignKey("adapters.id"), nullable=False, index=True),
    Column("base_model", String, nullable=False),
    Column("created", Integer, nullable=False),
)


@dataclass(frozen=True)
class NameRow:
    """One name with its adapter, as stored."""

    name: str
    adapter_id: str
    base_model: str
    created: int
    spec: AdapterSpec
    size_bytes: int


def open_database(path: Path) -> Engine:
    """Open or create the database.

    Raises:
        StorageFailed: it was written by another version of the schema.
        SQLAlchemyError: it cannot be opened.
    """
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
    )
    event.listen(engine, "connect", _set_pragmas)
    with engine.begin() as connection:
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version not in (0, _SCHEMA_VERSION):
            engine.dispose()
            raise StorageFailed(
                f"{path} has schema version {version}, this server knows {_SCHEMA_VERSION}; "
                "use the server version that wrote it, or another data folder"
            )
        _metadata.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    return engine


def _set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # A registration that was answered must survive a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


class NameTable:
    """The statements on one scope; each method works in the caller's transaction."""

    def __init__(self, scope: str, num_layers: int) -> None:
        self._scope = scope
        self._num_layers = num_layers

    def find(self, connection: Connection, name: str) -> NameRow | None:
        row = connection.execute(self._rows().where(names.c.name == name)).first()
        return self._decode(row) if row else None

    def find_like(self, connection: Connection, name: str) -> str | None:
        """Return a name that differs from `name` in case at most; stored names are ASCII."""
        query = select(names.c.name).where(
            names.c.scope == self._scope, func.lower(names.c.name) == name.casefold()
        )
        return connection.execute(query).scalar()

    def page(self, connection: Connection, limit: int, after: str | None) -> list[NameRow]:
        """Return up to `limit` rows behind `after`, ordered by name (code points)."""
        query = self._rows().order_by(names.c.name).limit(limit)
        if after is not None:
            query = query.where(names.c.name > after)
        return [self._decode(row) for row in connection.execute(query)]

    def add(self, connection: Connection, row: NameRow) -> None:
        spec = encode_spec(row.spec)
        connection.execute(
            sqlite_insert(adapters)
            .values(id=row.adapter_id, spec=spec, size_bytes=row.size_bytes)
            .on_conflict_do_nothing()
        )
        connection.execute(
            insert(names).values(
                scope=self._scope,
                name=row.name,
                adapter_id=row.adapter_id,
                base_model=row.base_model,
                created=row.created,
            )
        )

    def remove(self, connection: Connection, row: NameRow) -> bool:
        """Remove the name, and its adapter if that was the last name of it.

        Returns:
            Whether the adapter went too.
        """
        connection.execute(
            delete(names).where(names.c.scope == self._scope, names.c.name == row.name)
        )
        is_named = connection.execute(
            select(names.c.name).where(names.c.adapter_id == row.adapter_id).limit(1)
        ).first()
        if is_named:
            return False
        connection.execute(delete(adapters).where(adapters.c.id == row.adapter_id))
        return True

    def _rows(self) -> Select[Any]:
        return (
            select(
                names.c.name,
                names.c.adapter_id,
                names.c.base_model,
                names.c.created,
                adapters.c.spec,
                adapters.c.size_bytes,
            )
            .join(adapters)
            .where(names.c.scope == self._scope)
        )

    def _decode(self, row: Row[Any]) -> NameRow:
        return NameRow(
            name=row.name,
            adapter_id=row.adapter_id,
            base_model=row.base_model,
            created=row.created,
            spec=decode_spec(row.spec, self._num_layers),
            size_bytes=row.size_bytes,
        )


def stored_ids(connection: Connection) -> set[str]:
    """Ids of every adapter of every scope."""
    return set(connection.execute(select(adapters.c.id)).scalars())


def is_stored(connection: Connection, adapter_id: str) -> bool:
    """Whether any name of any scope stands for the adapter."""
    query = select(adapters.c.id).where(adapters.c.id == adapter_id)
    return connection.execute(query).first() is not None


def scope_of(base_id: str, geometry: ModelGeometry) -> str:
    """Return the stored form of one base; it must stay the same across releases."""
    sizes = (
        geometry.num_layers,
        geometry.hidden_size,
        geometry.num_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.intermediate_size,
    )
    return f"{base_id} {'-'.join(map(str, sizes))}"
