"""A client that leaves gives its pages back before the engine takes another step.

Over HTTP and against the real engine in its own process, whose diary says what was held when the
cancellation arrived and right after it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import threading

import httpx
import pytest

from loraplex_server.api.server import Server
from loraplex_server.api.services import Services
from loraplex_server.config import Config
from loraplex_server.engine.process_handle import ProcessEngine
from loraplex_server.text.vocabulary import Vocabulary
from tests.server.api.conftest import BASE, make_adapter, wait_until
from tests.support.adapters import make_catalog
from tests.support.tiny_tokenizer import make_tokenizer
from tests.support.watched_engine import LOADS, QUICK, build_watched, read_diary

LONG_PROMPT = [5 + i % 90 for i in range(400)]


class Watched:
    """A server over a watched engine, in a thread."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.catalog = make_catalog(folder / "data", base_name=BASE, on_discard=self._discard)
        self._engine = ProcessEngine(functools.partial(build_watched, folder))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._stop = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread.start()
        wait_until(lambda: self._stop is not None, timeout_s=120)

    async def _serve(self) -> None:
        config = Config(data_dir=self.folder / "data", shutdown_grace_s=5)
        await self._engine.start()
        services = Services(
            config, self._engine, self.catalog, Vocabulary(make_tokenizer()), base_names=(BASE,)
        )
        server = Server(services)
        loop = self._loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(server.stop)
        with self._listener:
            await server.serve_until_signal(self._listener)
        await self._engine.stop()

    def _discard(self, adapter_id: str) -> None:
        self._loop.call_soon_threadsafe(self._engine.discard_adapter, adapter_id)

    def close(self) -> None:
        self._stop()
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        self.catalog.close()

    def pool(self) -> dict:
        return httpx.get(f"{self.url}/v1/pool", timeout=20).json()

    def load(self) -> dict:
        return httpx.get(f"{self.url}/load", timeout=20).json()

    def ask(self, **fields) -> socket.socket:
        """Send a request and return its connection."""
        body = {"model": BASE, "max_tokens": 100, "ignore_eos": True, "temperature": 0, **fields}
        raw = json.dumps(body).encode()
        peer = socket.create_connection(self.address, timeout=30)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(raw)}\r\n"
        peer.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + raw)
        return peer

    def wait_until_nothing_runs(self) -> None:
        wait_until(lambda: self.load() == {"server_load": 0, "running": 0, "waiting": 0}, 30)
        pool = self.pool()
        assert (pool["kv"], pool["prefix_used"]) == (0, 0)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    (folder / LOADS).touch()
    server = Watched(folder)
    yield server
    server.close()


@pytest.fixture
def server(watched):
    """The server with slow steps, an empty diary, and nothing running in the end."""
    (watched.folder / QUICK).unlink(missing_ok=True)
    (watched.folder / "diary").unlink(missing_ok=True)
    yield watched
    (watched.folder / LOADS).touch()
    (watched.folder / QUICK).touch()
    watched.wait_until_nothing_runs()


def entries(server: Watched, num: int = 1) -> list[dict]:
    wait_until(lambda: len(read_diary(server.folder)) == num, timeout_s=30)
    return read_diary(server.folder)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_it_decodes_frees_its_pages(server, stream):
    peer = server.ask(prompt=[5, 6, 7], stream=stream, max_tokens=400)
    wait_until(lambda: server.pool()["kv"] > 0)
    peer.close()
    [entry] = entries(server)
    assert entry["before"]["pages"] > 0
    assert entry["before"]["running"] == 1
    assert (entry["after"]["pages"], entry["after"]["running"]) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_during_the_prefill_frees_its_pages(server, stream):
    generated = metric(server, "loraplex_generated_tokens_total")
    prompt = [*LONG_PROMPT, 1 + stream]  # another one each time, or it would be in the cache
    peer = server.ask(prompt=prompt[::-1], stream=stream)
    wait_until(lambda: server.load()["running"] == 1)
    peer.close()
    [entry] = entries(server)
    assert entry["before"]["generated"] == generated, "it was not in its prefill any more"
    assert entry["before"]["pages"] > 0
    assert (entry["after"]["pages"], entry["after"]["running"]) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_it_waits_leaves_the_queue(server, stream):
    occupants = [server.ask(prompt=[5, 6, 7 + i], max_tokens=450) for i in range(2)]
    wait_until(lambda: server.load()["running"] == 2)
    peer = server.ask(prompt=[8, 9], stream=stream)
    wait_until(lambda: server.load()["waiting"] == 1)
    peer.close()
    [entry] = entries(server)
    assert (entry["before"]["waiting"], entry["after"]["waiting"]) == (1, 0)
    assert entry["after"]["running"] == 2
    for occupant in occupants:
        occupant.close()
    entries(server, 3)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_its_adapter_loads_leaves_nothing(server, stream, tmp_path):
    name = f"slow-{stream}".lower()
    with httpx.Client(base_url=server.url, timeout=20) as http:
        folder = make_adapter(tmp_path / name, seed=1 + stream)
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        assert http.post("/v1/adapters", data={"name": name}, files=files).status_code == 201
    (server.folder / LOADS).unlink()
    peer = server.ask(model=name, prompt=[5, 6], stream=stream)
    wait_until(lambda: any(h["state"] == "loading" for h in server.pool()["by_adapter"]), 20)
    peer.close()
    [entry] = entries(server)
    assert (entry["before"]["waiting"], entry["after"]["waiting"]) == (1, 0)
    assert (entry["after"]["pages"], entry["after"]["running"]) == (0, 0)
    (server.folder / LOADS).touch()
    server.wait_until_nothing_runs()
    deleted = httpx.delete(f"{server.url}/v1/adapters/{name}", timeout=20)
    assert deleted.json()["freed"]["pool_bytes"] > 0
    wait_until(lambda: server.pool()["adapters"] == 0, timeout_s=20)


def test_leaving_frees_every_sample(server):
    peer = server.ask(prompt=[5, 6, 7], n=3, stream=True, max_tokens=400)
    wait_until(lambda: server.load()["running"] == 2)
    peer.close()
    last = entries(server, 3)[-1]["after"]
    assert (last["pages"], last["running"], last["waiting"]) == (0, 0, 0)


def metric(server: Watched, name: str) -> int:
    rows = httpx.get(f"{server.url}/metrics", timeout=20).text.splitlines()
    [row] = [row for row in rows if row.startswith(name + " ")]
    return int(float(row.split()[1]))
