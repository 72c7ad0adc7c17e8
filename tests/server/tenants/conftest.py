"""The registry's database, of each kind that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy
from sqlalchemy import Engine

from loraplex_server.adapters.registry_database import open_database, sqlite_url


@pytest.fixture(params=["sqlite", "postgresql"])
def open_one(request, tmp_path) -> Iterator[Callable[[], Engine]]:
    """Return a function that opens the same database once more, as another server does."""
    opened = []
    file_url = sqlite_url(tmp_path / "keys.sqlite3")
    is_shared = request.param == "postgresql"
    url = request.getfixturevalue("postgres") if is_shared else file_url

    def open_it() -> Engine:
        opened.append(open_database(url, lambda adapter_id: None))
        return opened[-1]

    yield open_it
    for engine in opened:
        engine.dispose()
    if is_shared:
        engine = sqlalchemy.create_engine(url.replace("postgresql", "postgresql+psycopg"))
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        engine.dispose()
