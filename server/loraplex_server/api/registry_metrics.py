"""How well the server follows a registry that several share."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_server.adapters.change_feed import ChangeFeed
from loraplex_server.api.families import family, single


class RegistryMetrics(Collector):
    """Used from any thread; asks no database.

    Args:
        changes: None where the registry is this server's alone, which has nothing to follow.
    """

    def __init__(self, changes: ChangeFeed | None) -> None:
        self._changes = changes

    def collect(self) -> Iterator[Metric]:
        """Yield everything so far."""
        name = "loraplex_registry_age_seconds"
        yield family(name, ()) if self._changes is None else single(name, self._changes.age_s)
