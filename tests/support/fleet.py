"""A fleet: real servers over one real PostgreSQL and one local S3 server, each a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loraplex import Client
from tests.support.object_store import ObjectStore, running_object_store, why_no_object_store
from tests.support.postgres import PostgresServer, running_postgres, why_no_postgres
from tests.support.server_process import ServerProcess, free_port
from tests.support.tiny_serving import save_served_model, tiny_flags

#: An admin's, of every replica.
API_KEY = "lp-of-the-fleet"


def why_no_fleet() -> str | None:
    """Return what is missing to run one, None if nothing is."""
    return why_no_postgres() or why_no_object_store()


@contextmanager
def running_fleet(
    folder: Path, num_replicas: int, *flags: str, env: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """Run replicas that are ready, with the tiny model and `flags`, until the block ends."""
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        postgres = stack.enter_context(running_postgres())
        files = stack.enter_context(running_object_store(folder))
        fleet = Fleet(folder, num_replicas, flags, postgres, files, env or {})
        stack.callback(fleet.stop)
        for replica in range(num_replicas):
            fleet.start(replica)
        fleet.wait_until_ready()
        yield fleet


class Fleet:
    """Replicas by number from 0; each keeps its port and its data folder when it is restarted.

    Attributes:
        replicas: the process of each, running or not.
        key: what requests bring.
        postgres, files: may be stopped and started, too.
    """

    def __init__(
        self,
        folder: Path,
        num_replicas: int,
        flags: tuple[str, ...],
        postgres: PostgresServer,
        files: ObjectStore,
        env: Mapping[str, str],
    ) -> None:
        self.key = API_KEY
        self.postgres, self.files = postgres, files
        self.replicas: dict[int, ServerProcess] = {}
        self._folder = folder
        self._ports = [free_port() for _ in range(num_replicas)]
        model = save_served_model(folder / "model")
        self._flags = (*tiny_flags(model), "--blob-url", files.url, *flags)
        self._env = {
            **files.env,
            "LORAPLEX_REGISTRY_URL": postgres.url,
            "LORAPLEX_API_KEY": self.key,
            **env,
        }

    @property
    def urls(self) -> list[str]:
        """Where each replica listens, whether it runs or not."""
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    def data_dir(self, replica: int) -> Path:
        """Return where a replica keeps its own files."""
        return self._folder / f"replica-{replica}" / "data"

    def client(self, replica: int) -> Client:
        """Return a client of one replica, which tries nothing twice; the caller's to close."""
        return Client(base_url=self.urls[replica], api_key=self.key, max_retries=0, timeout=60)

    def start(self, replica: int, *flags: str) -> None:
        """Start one that does not run, this time with more flags; it is not ready yet."""
        folder, port = self._folder / f"replica-{replica}", self._ports[replica]
        self.replicas[replica] = ServerProcess(
            folder, *self._flags, *flags, env=self._env, port=port
        )

    def wait_until_ready(self) -> None:
        """Wait until all that were started are ready."""
        for process in self.replicas.values():
            process.wait_until_ready()

    def kill(self, replica: int) -> None:
        """End one without warning (SIGKILL)."""
        self.replicas[replica].process.kill()
        self.replicas[replica].process.wait()

    def restart(self, replica: int, *flags: str) -> None:
        """Start one again that was killed or stopped, and wait until it is ready."""
        self.start(replica, *flags)
        self.replicas[replica].wait_until_ready()

    def mend(self) -> None:
        """Start again those that do not run, and wait until all are ready."""
        for replica, process in list(self.replicas.items()):
            if process.process.poll() is not None:
                self.start(replica)
        self.wait_until_ready()

    def stop(self) -> None:
        """Ask all to stop, and wait for them."""
        for process in self.replicas.values():
            if process.process.poll() is None:
                process.process.terminate()
        for process in self.replicas.values():
            process.stop()
