"""A loraplex server in a process of its own, while a block runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loraplex import APIConnectionError, Client


@contextmanager
def started_server(
    command: Sequence[str], base_url: str, log: Path, *, limit_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `command`, wait until it answers, and end it behind the block.

    Args:
        log: what it writes goes there.
        limit_s: after so long without an answer the benchmark ends.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            _wait_until_ready(base_url, process, log, limit_s)
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_until_ready(
    base_url: str, process: subprocess.Popen[bytes], log: Path, limit_s: float
) -> None:
    client = Client(base_url=base_url)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        with suppress(APIConnectionError):
            if client.health().status == "ok":
                return
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {limit_s:.0f} s")
