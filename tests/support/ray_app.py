"""The Ray Serve application on a Ray of a test's own, by `serve run` and a configuration file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from loraplex.prometheus_text import parse_families
from tests.support.processes import is_alive
from tests.support.server_process import free_port

#: Of nobody's home folder, without telling anybody of it, and small.
_ENV = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 << 20),
}
#: `serve`, over a Ray without its dashboard, of whose processes nobody here asks anything.
_SERVE = """
import ray
from ray.serve.scripts import cli
ray.init(num_cpus=4, namespace="serve", include_dashboard=False)
cli()
"""
_REPLICA = "ServeReplica:loraplex:replica"
#: An admin's.
API_KEY = "lp-of-the-application"


class RayApp:
    """Started on construction, with a front and two replicas; `stop` ends all of Ray's processes.

    Attributes:
        http: a client of it with a key, for what the SDK would hide.

    Args:
        arguments: of `build_app`.
        env: what the application finds in the environment beside.
        options: of the two deployments by their names, beside or instead of those here.
        address: of a cluster that runs; None for a Ray of its own.
    """

    def __init__(
        self,
        folder: Path,
        arguments: dict[str, Any],
        env: dict[str, str],
        *,
        options: dict[str, dict[str, Any]] | None = None,
        address: str | None = None,
    ) -> None:
        port = free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        key = {"authorization": f"Bearer {API_KEY}"}
        self.http = httpx.Client(base_url=self.base_url, headers=key, timeout=120)
        self.log = folder / "serve.log"
        config = folder / "serve.yaml"
        config.write_text(yaml.safe_dump(_config(port, arguments, options or {})))
        # Not in `folder`: names of sockets in it must be short.
        self._session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        command = [sys.executable, "-c", _SERVE, "run", str(config)]
        if address is not None:
            command = [sys.executable, "-m", "ray.serve.scripts", *command[3:]]
            command += ["--address", address]
        usual = ray_environment(LORAPLEX_API_KEY=API_KEY, RAY_TMPDIR=self._session, **env)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=usual)

    def wait_until_ready(self, num_replicas: int = 2, timeout_s: float = 240.0) -> None:
        """Wait until so many replicas answer."""
        deadline = time.monotonic() + timeout_s
        while len(self.requests_by_replica()) < num_replicas:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def requests_by_replica(self) -> dict[str, dict[str, float]]:
        """Return how many requests each replica has ended of each adapter; none of who is away."""
        try:
            answer = self.http.get("/metrics")
        except httpx.TransportError:
            return {}
        found: dict[str, dict[str, float]] = {}
        if answer.status_code == 200:
            for family in parse_families(answer.text):
                for name, labels, value in family.samples:
                    if name == "loraplex_requests_running":
                        found.setdefault(labels["replica"], {})
                    if name == "loraplex_adapter_requests_total":
                        found.setdefault(labels["replica"], {})[labels["adapter"]] = value
        return found

    def replica_processes(self) -> list[psutil.Process]:
        """Return the actors of the replicas."""
        return [process for process in self._processes() if _REPLICA in _title(process)]

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does; raises AssertionError if anything had to be killed."""
        processes = self._processes()
        self.http.close()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        deadline = time.monotonic() + 20
        # Not psutil's own wait: it waits for zombies too, and nobody may take those away.
        while (left := [p for p in processes if is_alive(p.pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            process.kill()
        shutil.rmtree(self._session, ignore_errors=True)
        assert not left, f"{left} went on without Ray: {self.log.read_text()}"

    def _processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def ray_environment(**more: str) -> dict[str, str]:
    """Return what a Ray of a test's own finds in its environment."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORAPLEX_", "RAY_"))}
    return {**inherited, **_ENV, **more}


def _config(
    port: int, arguments: dict[str, Any], options: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    def small(name: str, **usual: Any) -> dict[str, Any]:
        # How often a replica that is to end looks whether it may; it waits that long at least.
        always = {"name": name, "graceful_shutdown_wait_loop_s": 0.1}
        always["ray_actor_options"] = {"num_cpus": 0.5}
        return {**always, **usual, **options.get(name, {})}

    two = {"min_replicas": 2, "max_replicas": 2}
    application = {
        "name": "loraplex",
        "route_prefix": "/",
        "import_path": "loraplex_server.ray_serve.app:build_app",
        "args": arguments,
        "deployments": [small("front", num_replicas=1), small("replica", autoscaling_config=two)],
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [application],
    }
