"""A server under abuse, end to end: a short soak, a burst, and a signal in the middle of a stream.

`run_soak.py` is the long one.
"""

from __future__ import annotations

import asyncio
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.run_soak import make_adapters, soak
from tests.support.tiny_serving import NAME, TinyServer

NUM_CLIENTS = 48
_MAX_ATTEMPTS = 25


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = ("--max-running", "8", "--max-queued", "8", "--shutdown-grace-s", "60")
    server = TinyServer(tmp_path_factory.mktemp("soak"), *flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def test_a_short_soak_leaks_nothing_and_loses_nothing(server, tmp_path):
    figures = soak(server, make_adapters(tmp_path, 6), requests=300, concurrency=24)
    assert figures["problems"] == []
    assert figures["sequences"] > 100


def test_clients_that_come_back_when_told_get_in(server):
    """Three times as many clients as places; each comes back as told and never sooner."""

    async def ask(http: httpx.AsyncClient) -> int:
        body = {"model": NAME, "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            answer = await http.post("/v1/completions", json=body)
            if answer.status_code == 200:
                return attempt
            assert answer.status_code == 429, answer.text
            told_s = int(answer.headers["retry-after-ms"]) / 1000
            assert told_s <= int(answer.headers["retry-after"]) <= told_s + 1
            await asyncio.sleep(told_s)
        raise AssertionError(f"refused {_MAX_ATTEMPTS} times")

    async def burst() -> list[int]:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as http:
            return await asyncio.gather(*(ask(http) for _ in range(NUM_CLIENTS)))

    attempts = asyncio.run(burst())
    print(f"attempts: {sorted(attempts)}")
    assert max(attempts) > 1, "nobody was refused"


def test_a_signal_lets_the_running_stream_end_and_the_server_exits_cleanly(server):
    body = {"model": NAME, "prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    url = f"{server.base_url}/v1/completions"
    with (
        ThreadPoolExecutor() as threads,
        httpx.stream("POST", url, json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = threads.submit(lambda: [line for line in lines if line])
        events = [json.loads(line[6:]) for line in rest.result(timeout=60)[:-1]]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=30) == 0, server.log.read_text()
