"""A local S3 server in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.server_process import free_port


def why_no_object_store() -> str | None:
    """Return what is missing to run one, None if nothing is."""
    missing = [name for name in ("moto", "flask", "s3fs") if not importlib.util.find_spec(name)]
    return f"no local S3 server: {', '.join(missing)} not installed" if missing else None


@contextmanager
def running_object_store(folder: Path) -> Iterator[ObjectStore]:
    """Run a server with one empty bucket until the block ends."""
    server = ObjectStore(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class ObjectStore:
    """What it holds is in its memory: a stop loses it, and a start begins with an empty bucket.

    Attributes:
        url: of the bucket, for `blob_url`.
        env: what a process needs in its environment to find the server.
    """

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.url = "s3://adapters/blobs"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",  # where it was stopped, tests would wait for the others
        }

    def start(self) -> None:
        """Start it, wait until it answers, and make the bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        with (self._folder / "s3.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        for _ in range(600):
            assert self._process.poll() is None, (self._folder / "s3.log").read_text()
            try:
                httpx.put(f"{self.endpoint}/adapters", timeout=30).raise_for_status()
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"not ready: {(self._folder / 's3.log').read_text()}")

    def stop(self) -> None:
        """Stop it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
