"""Other servers: how each is started, and how a request names an adapter there.

A TOML file names them; `docs/benchmarks/cpu.md` shows one for vLLM and llama.cpp:

    [[server]]
    name = "vLLM"                          # in the report
    command = "vllm serve ..."             # split as by a shell; placeholders below
    base_url = "http://127.0.0.1:8101"
    env = { NAME = "value" }
    base_model = "base"                    # name of the base model there
    select = "model"                       # or "lora-field", which is llama.cpp's
    load_calls = true                      # POST /v1/load_lora_adapter before a first use
    starts = [32, 512]                     # one start with 32 adapters, one with 512
    adapter_file = "DIR/a{index:04d}.gguf" # of one adapter, for {adapter_files}

Placeholders in `command`: {model} and {adapters} are folders, {num_adapters} how many
this start is for, {adapter_files} the comma-separated files of as many adapters. Without `starts`
one start serves all cells.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import time
import tomllib
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_load import completion_body
from peer_cells import Cell
from recorded_response import ResponseError, exchange, request_bytes
from workload import Work

_START_LIMIT_S = 300.0
_STOP_LIMIT_S = 60.0


class PeerError(Exception):
    """A server that could not be described, started or used; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One server of the comparison; the module's docstring tells of the fields."""

    name: str
    command: str
    base_url: str
    env: dict[str, str] = field(default_factory=dict)
    base_model: str = "base"
    select: str = "model"
    load_calls: bool = False
    starts: tuple[int, ...] = ()
    adapter_file: str = ""

    def body(self, item: Work) -> dict[str, Any]:
        """Return the request that this server understands."""
        if self.select == "model":
            name = self.base_model if item.adapter is None else adapter_name(item.adapter)
            return completion_body(item, name)
        # llama.cpp takes an empty list for every adapter at once, so the base is the first at 0.
        lora = {"id": item.adapter or 0, "scale": 0.0 if item.adapter is None else 1.0}
        return completion_body(item, self.base_model) | {"lora": [lora], "cache_prompt": False}

    def command_for(self, num_adapters: int, *, model: Path, adapters: Path) -> list[str]:
        """Return the program and its arguments, placeholders filled."""
        files = (self.adapter_file.format(index=i) for i in range(num_adapters))
        values = {
            "model": model,
            "adapters": adapters,
            "num_adapters": num_adapters,
            "adapter_files": ",".join(files),
        }
        return [part.format(**values) for part in shlex.split(self.command)]

    def groups(self, cells: Sequence[Cell]) -> list[tuple[int, list[Cell]]]:
        """Return how many adapters each start is for, and the cells to run then."""
        if not self.starts:
            most = max((cell.num_adapters for cell in cells), default=0)
            return [(most, list(cells))] if cells else []
        found: dict[int, list[Cell]] = {}
        for cell in cells:
            fitting = [n for n in sorted(self.starts) if n >= cell.num_adapters]
            if fitting:
                found.setdefault(fitting[0], []).append(cell)
        return list(found.items())


def adapter_name(index: int) -> str:
    return f"a{index:04d}"


def read_peers(path: Path) -> list[Peer]:
    """Read the servers of a TOML file.

    Raises:
        PeerError: a field is missing, unknown or wrong.
    """
    try:
        content = tomllib.loads(path.read_text())
        peers = [Peer(**entry) for entry in content.pop("server", [])]
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise PeerError(f"{path}: {error}") from error
    if content or any(peer.select not in ("model", "lora-field") for peer in peers):
        raise PeerError(f'{path}: only [[server]] tables, with select = "model" or "lora-field"')
    return peers


class RunningServer:
    """A started server; `ready` says that it answers."""

    def __init__(self, peer: Peer, process: subprocess.Popen[bytes]) -> None:
        self.peer = peer
        self.pid = process.pid
        self._process = process
        self._loaded: set[int] = set()

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60) -> Any:
        """Send one request and return the answer's JSON, or its text.

        Raises:
            PeerError: there is no answer, or it is an error.
        """
        url = urllib.parse.urlsplit(self.peer.base_url)
        host, port = url.hostname or "127.0.0.1", url.port or 80
        request = request_bytes(host, url.path.rstrip("/") + path, body)
        try:
            return asyncio.run(exchange(host, port, request, timeout_s)).json()
        except (OSError, TimeoutError, ResponseError) as error:
            raise PeerError(f"{self.peer.name}: {path}: {error}") from error

    def wait_until_ready(self, log: Path) -> None:
        """Return once the models are listed.

        Raises:
            PeerError: the process ended, or did not answer within five minutes.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = log.read_text(errors="replace")[-2000:]
                raise PeerError(f"{self.peer.name} ended while starting:\n{tail}")
            with suppress(PeerError):
                self.call("/v1/models", timeout_s=5)
                return
            time.sleep(0.5)
        raise PeerError(f"{self.peer.name} was not ready within {_START_LIMIT_S:.0f} s; see {log}")

    def load(self, indexes: Sequence[int], adapters: Path) -> list[float]:
        """Load adapters where a call is needed for it; return seconds of each call."""
        if not self.peer.load_calls:
            return []
        seconds = []
        for index in sorted(set(indexes) - self._loaded):
            name = adapter_name(index)
            started = time.perf_counter()
            self.call(
                "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapters / name)}
            )
            seconds.append(time.perf_counter() - started)
            self._loaded.add(index)
        return seconds

    def check_adapters(self, num_adapters: int) -> None:
        """See that llama.cpp has them all: it answers for an unknown one as the base model.

        Raises:
            PeerError: some are missing.
        """
        if self.peer.select == "lora-field" and num_adapters:
            found = len(self.call("/lora-adapters"))
            if found < num_adapters:
                raise PeerError(f"{self.peer.name} has {found} adapters, not {num_adapters}")


@contextmanager
def running(
    peer: Peer, num_adapters: int, *, model: Path, adapters: Path, log: Path
) -> Iterator[RunningServer]:
    """Run the server while the block runs, in a session of its own.

    Raises:
        PeerError: it could not be started.
    """
    command = peer.command_for(num_adapters, model=model, adapters=adapters)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | peer.env,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"{peer.name}: {error}") from error
        try:
            server = RunningServer(peer, process)
            server.wait_until_ready(log)
            server.check_adapters(num_adapters)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_STOP_LIMIT_S)
            # What it started must not live on beside the next server.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
