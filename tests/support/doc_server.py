"""The servers that the commands of the documentation talk to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from loraplex import Client
from tests.support.server_process import ServerProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "examples"
ADAPTERS = ("pirate", "json-extract", "sql", "ticket-label")

_SMALL = ("--pool-bytes", "256MiB", "--host-bytes", "64MiB", "--max-model-len", "2048")
_ONE_THREAD = ("--threads", "1")

Settings = tuple[tuple[tuple[str, str], ...], tuple[str, ...]]


class DocServers:
    """One server for each combination of settings; `close` them, or use it as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[Settings, ServerProcess] = {}

    def get(self, variables: Mapping[str, str], flags: Sequence[str]) -> ServerProcess:
        """Return a server with these settings and the example adapters, no others."""
        settings = (tuple(sorted(variables.items())), tuple(flags))
        if settings not in self._servers:
            folder = self._folder / str(len(self._servers))
            server = ServerProcess(folder, *_SMALL, *_ONE_THREAD, *flags, env=variables)
            self._servers[settings] = server
            server.wait_until_ready()
        server = self._servers[settings]
        with Client(base_url=server.base_url, api_key=variables.get("LORAPLEX_API_KEY")) as client:
            restore_adapters(client)
        return server

    def close(self) -> None:
        """Stop all of them."""
        for server in self._servers.values():
            server.stop()

    def __enter__(self) -> DocServers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def restore_adapters(client: Client) -> None:
    """Leave the example adapters as they come, and nothing else."""
    for adapter in list(client.adapters.list()):
        client.adapters.delete(adapter.name, mode="cancel")
    for name in ADAPTERS:
        client.adapters.push(EXAMPLES / name, name=name)
