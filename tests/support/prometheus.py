"""Debian's Prometheus and promtool: a server of its own that scrapes one target."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server_process import free_port

CONFIG = Path(__file__).parents[2] / "docker" / "prometheus"


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test where a program is not installed."""
    reason = f"{program} is not installed: apt-get install prometheus"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


class Prometheus:
    """With our rules and our scrape configuration, but for where and how often; stop it."""

    def __init__(self, folder: Path, target: str, every_s: float = 0.5) -> None:
        self._target = target
        shutil.copytree(CONFIG, folder, dirs_exist_ok=True)
        config = (folder / "prometheus.yml").read_text()
        assert config.count('"loraplex:8000"') == 1
        config = config.replace("loraplex:8000", target)
        interval = f"interval: {int(every_s * 1000)}ms"
        (folder / "prometheus.yml").write_text(config.replace("interval: 15s", interval))
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self._log = folder / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_until_scraping(self, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._is_scraping():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

    def _is_scraping(self) -> bool:
        try:
            return [value for _, value in self.query("up")] == [1.0]
        except httpx.TransportError:
            return False

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and values of what an expression is now."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=20)
        if answer.status_code == 503:  # it is starting
            return []
        body: dict[str, Any] = answer.json()
        assert body["status"] == "success", (expr, body)
        return [(row["metric"], float(row["value"][1])) for row in body["data"]["result"]]

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
