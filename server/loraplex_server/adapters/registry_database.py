"""Opening the registry's database: SQLite in the data folder, or any by URL, at one schema."""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.registry_migrations import (
    BlobUpgrade,
    migrate_from_1,
    migrate_from_2,
    migrate_from_3,
)
from loraplex_server.adapters.registry_tables import metadata, registry_identity, schema_version
from loraplex_server.adapters.tenant_tables import audit

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 5
#: Between two attempts to reach a database that is not there yet.
_RETRY_S: Final = 1.0
_BUSY_TIMEOUT_S: Final = 10.0
_NO_URL: Final = (
    "registry_url is not a database URL such as postgresql://user:password@host/name, where "
    "special characters of a password are written as %XX"
)
#: For one of the connections, when all are in use.
_POOL_TIMEOUT_S: Final = 5.0
#: Of PostgreSQL: one server at a time may make or migrate the tables.
_MIGRATION_LOCK: Final = 0x10AF1E


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return f"sqlite:///{path}"


def wait_for_database(url: str, wait_s: float) -> None:
    """Wait until a shared database takes connections: it may be starting together with the server.

    Raises:
        StorageFailed: it has not for so long, or the URL is not one; the message says what to do.
    """
    engine = _make_engine(url)
    deadline_s = time.monotonic() + wait_s
    told = None
    try:
        # Whatever the reason: a database that is being set up has no user and no password yet.
        while (reason := _why_no_connection(engine)) is not None:
            if time.monotonic() >= deadline_s:
                raise StorageFailed(
                    f"{_unanswered(reason)} A server that starts waits for it for registry_wait_s "
                    f"({wait_s:g} s)."
                )
            if reason != told:
                log.warning("waiting up to %g s for the registry: %s", wait_s, reason)
                told = reason
            time.sleep(_RETRY_S)
    finally:
        engine.dispose()


def _why_no_connection(engine: Engine) -> str | None:
    try:
        with engine.connect():
            return None
    except OperationalError as error:
        return _reason_of(error)


def _reason_of(error: OperationalError) -> str:
    """Return what the driver says, in one line."""
    return " ".join(str(error.orig or error).split())


def _unanswered(reason: str) -> str:
    return (
        f"the registry does not answer: {reason}. Start its database, or correct registry_url "
        "(LORAPLEX_REGISTRY_URL)."
    )


def opening_registry(*, is_shared: bool) -> str:
    """Return what `open_database` is about, for `storage_errors`."""
    return "open the registry" + (" that registry_url names" if is_shared else "")


def open_database(url: str, upgrade_blob: BlobUpgrade) -> Engine:
    """Open or create the database and bring it to the current schema.

    Args:
        url: SQLAlchemy's (`sqlite:///file`, `postgresql+psycopg://user@host/name`).
        upgrade_blob: see `migrate_from_1`.

    Raises:
        StorageFailed: a newer server wrote it, its driver is not installed, or it is on another
            machine and does not answer.
        SQLAlchemyError: it cannot be opened.
    """
    engine = _make_engine(url)
    try:
        with engine.begin() as connection:
            _bring_to_schema(connection, upgrade_blob)
    except BaseException as error:
        engine.dispose()
        if isinstance(error, OperationalError) and engine.dialect.name != "sqlite":
            raise StorageFailed(_unanswered(_reason_of(error))) from error
        raise
    return engine


def _make_engine(url: str) -> Engine:
    for short in ("postgresql://", "postgres://"):  # libpq takes both
        if url.startswith(short):
            url = "postgresql+psycopg://" + url.removeprefix(short)
    is_sqlite = url.startswith("sqlite")
    try:
        if is_sqlite:
            options = {"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False}
            engine = create_engine(url, connect_args=options)
        else:
            engine = create_engine(
                url,
                connect_args=_patience(url),
                # Whatever the database's own default: ids of changes are given out under a lock,
                # and who gets it must see what its last holder committed.
                isolation_level="READ COMMITTED",
                pool_pre_ping=True,
                pool_timeout=_POOL_TIMEOUT_S,
            )
    except NoSuchModuleError as error:
        raise StorageFailed(f"{_NO_URL}: {error}") from error
    except (ArgumentError, ValueError):
        # Nothing of it is shown, and no cause: early releases of SQLAlchemy 2.0 repeat what they
        # cannot parse, and what was taken for a port may be a password's end.
        raise StorageFailed(_NO_URL) from None
    except ImportError as error:
        raise StorageFailed(
            f"the driver of registry_url is not installed ({error.name}); for PostgreSQL: "
            "pip install 'loraplex[postgres]'"
        ) from error
    if is_sqlite:
        event.listen(engine, "connect", _set_pragmas)
    return engine


def _patience(url: str) -> dict[str, int]:
    """Return how long to wait for PostgreSQL, where its URL does not say: libpq waits for minutes.

    Requests wait for it, and go on with what is known once it is plain that it does not answer.
    """
    if not url.startswith("postgresql+psycopg:"):
        return {}
    usual = {
        "connect_timeout": 5,
        "tcp_user_timeout": 8_000,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }
    return {name: value for name, value in usual.items() if name not in make_url(url).query}


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
    if connection.execute(select(registry_identity)).first() is None:
        connection.execute(insert(registry_identity).values(id=secrets.token_hex(16)))
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif version < SCHEMA_VERSION:
        connection.execute(schema_version.delete())
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))


def read_identity(connection: Connection) -> str:
    """Return what tells this registry from all others; copies of it have the same."""
    return str(connection.execute(select(registry_identity.c.id)).scalar_one())


def _version_of(connection: Connection) -> int:
    """Return the schema's version; 0 of an empty database."""
    if connection.dialect.name == "sqlite":  # where servers of every version look for it
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if not inspect(connection).has_table(schema_version.name):
        return 0
    return int(connection.execute(select(schema_version.c.version)).scalar_one())
