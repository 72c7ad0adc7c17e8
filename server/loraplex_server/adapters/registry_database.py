"""Opening the registry's database: SQLite in the data folder, or any by URL, at one schema."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.registry_migrations import (
    BlobUpgrade,
    migrate_from_1,
    migrate_from_2,
    migrate_from_3,
)
from loraplex_server.adapters.registry_tables import metadata, schema_version
from loraplex_server.adapters.tenant_tables import audit

SCHEMA_VERSION: Final = 4
_BUSY_TIMEOUT_S: Final = 10.0
#: Of PostgreSQL: one server at a time may make or migrate the tables.
_MIGRATION_LOCK: Final = 0x10AF1E


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return f"sqlite:///{path}"


def open_database(url: str, upgrade_blob: BlobUpgrade) -> Engine:
    """Open or create the database and bring it to the current schema.

    Args:
        url: SQLAlchemy's (`sqlite:///file`, `postgresql+psycopg://user@host/name`).
        upgrade_blob: see `migrate_from_1`.

    Raises:
        StorageFailed: a newer server wrote it, or its driver is not installed.
        SQLAlchemyError: it cannot be opened.
    """
    engine = _make_engine(url)
    try:
        with engine.begin() as connection:
            _bring_to_schema(connection, upgrade_blob)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _make_engine(url: str) -> Engine:
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    is_sqlite = url.startswith("sqlite")
    options = {"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False} if is_sqlite else {}
    try:
        engine = create_engine(url, connect_args=options, pool_pre_ping=not is_sqlite)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StorageFailed(f"registry_url is not a database URL: {error}") from error
    except ImportError as error:
        raise StorageFailed(
            f"the driver of registry_url is not installed ({error.name}); for PostgreSQL: "
            "pip install 'loraplex[postgres]'"
        ) from error
    if is_sqlite:
        event.listen(engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # A registration that was answered must survive a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _bring_to_schema(connection: Connection, upgrade_blob: BlobUpgrade) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
    elif connection.dialect.name == "sqlite":
        # Before the first statement: pysqlite begins no transaction of its own for tables.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    version = _version_of(connection)
    if version > SCHEMA_VERSION:
        raise StorageFailed(
            f"the registry has schema version {version}, this server knows {SCHEMA_VERSION}; use "
            "the server version that wrote it, or another data folder"
        )
    if version == 1:
        migrate_from_1(connection, upgrade_blob)
    if version in (1, 2):
        migrate_from_2(connection)
    if version == 3:
        migrate_from_3(connection)
    assert audit.name in metadata.tables, "all tables are there, or not all would be made"
    metadata.create_all(connection)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif version < SCHEMA_VERSION:
        connection.execute(schema_version.delete())
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))


def _version_of(connection: Connection) -> int:
    """Return the schema's version; 0 of an empty database."""
    if connection.dialect.name == "sqlite":  # where servers of every version look for it
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if not inspect(connection).has_table(schema_version.name):
        return 0
    return int(connection.execute(select(schema_version.c.version)).scalar_one())
