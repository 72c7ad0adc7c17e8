"""A real `loraplex serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.support.processes import largest_child_of


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """Started on construction; `stop` ends it and everything it started."""

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir / "server.log"
        data_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "loraplex_server", "--port", str(self.port)]
        command += ["--data-dir", str(data_dir / "data"), *flags]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LORAPLEX_")}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**inherited, **(env or {})}
            )

    def wait_until_ready(self, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            if self.health() == 200:
                return
            time.sleep(0.2)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def health(self) -> int | None:
        """Return the status of /health, or None when nobody answers."""
        try:
            return httpx.get(f"{self.base_url}/health", timeout=5).status_code
        except httpx.TransportError:
            return None

    def pool(self) -> dict:
        return httpx.get(f"{self.base_url}/v1/pool", timeout=30).json()

    def wait_until_no_kv(self, timeout_s: float = 30.0) -> None:
        """Wait until no sequence holds a page."""
        deadline = time.monotonic() + timeout_s
        while self.pool()["kv"]:
            assert time.monotonic() < deadline, f"pages leaked: {self.pool()}"
            time.sleep(0.1)

    def engine_pid(self) -> int:
        """Return the id of the engine process."""
        return largest_child_of(self.process.pid)

    def stop(self) -> int:
        """Ask it to stop, as a person would; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode
