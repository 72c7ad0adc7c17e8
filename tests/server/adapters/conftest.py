"""Catalogues of several servers over one registry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy

from loraplex_server.adapters.catalog import AdapterCatalog
from tests.support.adapters import make_catalog, make_folder


@pytest.fixture
def open_replica(postgres, tmp_path) -> Iterator[Callable[[str], AdapterCatalog]]:
    """Return a function that opens another server's catalogue over the same registry and files."""
    opened = []

    def open_one(name: str, **settings) -> AdapterCatalog:
        catalog = make_catalog(
            tmp_path / name,
            registry_url=postgres,
            **{"blob_url": str(tmp_path / "blobs"), **settings},
        )
        opened.append(catalog)
        return catalog

    yield open_one
    for catalog in opened:
        catalog.close()
    engine = sqlalchemy.create_engine(postgres.replace("postgresql", "postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [make_folder(tmp_path / f"f{seed}", seed=seed) for seed in range(3)]


def wait_for_lock(catalog: AdapterCatalog) -> None:
    """Wait until some transaction waits for another one."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    for _ in range(600):
        with catalog.database.connect() as connection:
            if connection.exec_driver_sql(waiting).scalar_one():
                return
        time.sleep(0.05)
    raise AssertionError("nobody waits")
