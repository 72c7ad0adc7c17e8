"""The database with the keys, as the settings name it, for whoever has no catalogue open.

A server may be running on it: SQLite lets several processes in, and the schema is brought to
today's first, which a server of the release before survives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.registry_database import (
    open_database,
    opening_registry,
    sqlite_url,
)
from loraplex_server.adapters.registry_migrations import UpgradedBlob
from loraplex_server.config import Config
from loraplex_server.tenants.key_store import KeyStore

_DATABASE = "catalog.sqlite3"


@contextmanager
def open_key_store(config: Config) -> Iterator[KeyStore]:
    """Open the keys of the settings' data folder or registry, which is made if need be.

    Raises:
        StorageFailed
    """
    with storage_errors("open the data folder"):
        config.data_dir.mkdir(parents=True, exist_ok=True)
    url = config.registry_url or sqlite_url(config.data_dir / _DATABASE)
    with storage_errors(opening_registry(is_shared=config.registry_url is not None)):
        database = open_database(url, _refuse_upgrade)
    try:
        yield KeyStore(database)
    finally:
        database.dispose()


def has_keys(config: Config) -> bool:
    """Whether the server that these settings make would need keys; makes nothing.

    Raises:
        StorageFailed
    """
    if config.api_key is not None:
        return True
    if config.registry_url is None and not (config.data_dir / _DATABASE).exists():
        return False
    with open_key_store(config) as store:
        return store.read().is_any


def _refuse_upgrade(adapter_id: str) -> UpgradedBlob | None:
    raise StorageFailed(
        "the data folder is of the first release, whose adapters must be written again: start the "
        "server on it once, on a loopback address, and try again"
    )
