"""A fleet with proxies before it: who answers what, and what is under way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from loraplex import Client
from loraplex.types import Metrics
from tests.support.fleet import Fleet
from tests.support.routed_load import HANG_S, REPLICA_HEADER
from tests.support.tiny_serving import NAME


@dataclass(frozen=True)
class Site:
    """A fleet and the proxies before it.

    Attributes:
        proxies: their URLs.
        adapters: names of those that all replicas serve.
    """

    fleet: Fleet
    proxies: Mapping[str, str]
    adapters: Sequence[str]

    def client(self, proxy: str) -> Client:
        """Return a client of our SDK; the caller's to close."""
        return Client(base_url=self.proxies[proxy], api_key=self.fleet.key, timeout=HANG_S)

    def plain(self, proxy: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.fleet.key}"}
        return httpx.Client(base_url=self.proxies[proxy], headers=headers, timeout=HANG_S)

    def asked(self, replica: int) -> dict[str, int]:
        """Return how many sequences of each adapter a replica was asked for."""
        with self.fleet.client(replica) as client:
            samples = client.metrics().samples("loraplex_adapter_requests_total")
        return {sample.labels["adapter"]: int(sample.value) for sample in samples}

    def homes(self, proxy: str, replicas: Sequence[int] = (0, 1, 2)) -> dict[str, int]:
        """Ask each adapter in all ways that proxies learn its name from; return who answered."""
        before = {replica: self.asked(replica) for replica in replicas}
        with self.client(proxy) as sdk, self.plain(proxy) as plain:
            for name in self.adapters:
                sdk.completions.create(model=name, prompt="hello", max_tokens=2)
                # The name comes late, as OpenAI's client writes it.
                body = {"prompt": "hello " * 200, "max_tokens": 2, "model": name}
                assert plain.post("/v1/completions", json=body).status_code == 200
                body = {"model": NAME, "prompt": "hello", "max_tokens": 2, "lora_path": name}
                assert plain.post("/v1/completions", json=body).status_code == 200
        after = {replica: self.asked(replica) for replica in replicas}
        more = {
            (name, replica): after[replica].get(name, 0) - before[replica].get(name, 0)
            for name in self.adapters
            for replica in replicas
        }
        assert sum(more.values()) == 3 * len(self.adapters), more
        found = {name: max(replicas, key=lambda r: more[name, r]) for name in self.adapters}
        # HAProxy may still count the request before when the next one comes, and the bound of so
        # few is one: so one of the three may have gone elsewhere.
        assert all(more[name, home] >= 2 for name, home in found.items()), more
        return found

    def metrics(self) -> list[Metrics]:
        """Return the metrics of each replica."""
        found = []
        for replica in range(len(self.fleet.urls)):
            with self.fleet.client(replica) as client:
                found.append(client.metrics())
        return found

    def working(self) -> list[int]:
        """Return how many requests each replica has under way."""
        headers = {"Authorization": f"Bearer {self.fleet.key}"}
        answers = [
            httpx.get(f"{url}/load", headers=headers, timeout=HANG_S) for url in self.fleet.urls
        ]
        return [answer.json()["server_load"] for answer in answers]

    def wait_for_work(self, num: int) -> list[int]:
        """Wait until all replicas together have so many requests under way; return who has."""
        deadline = time.monotonic() + HANG_S
        while sum(working := self.working()) != num:
            assert time.monotonic() < deadline, working
            time.sleep(0.02)
        return working

    def wait_until_all_take_part(self, proxy: str) -> None:
        """Wait until the proxy sends requests of the base model to all replicas."""
        seen: set[str] = set()
        deadline = time.monotonic() + HANG_S
        with self.plain(proxy) as plain:
            while len(seen) < len(self.fleet.urls):
                assert time.monotonic() < deadline, seen
                answer = plain.get("/version")
                if answer.status_code == 200:  # what the proxy itself says is of no replica
                    seen.add(answer.headers[REPLICA_HEADER])

    def wait_for_restart(self, replica: int) -> None:
        """Wait until an engine that was lost is replaced: once, by one that can compute."""
        deadline = time.monotonic() + 2 * HANG_S
        while True:
            health = httpx.get(f"{self.fleet.urls[replica]}/health", timeout=HANG_S).json()
            if health["restarts"] == 1 and health["status"] == "ok":
                return
            assert time.monotonic() < deadline, health
            time.sleep(0.1)

    def num_cancelled(self) -> float:
        series = "loraplex_requests_finished_total"
        return sum(metrics.value(series, outcome="cancelled") or 0 for metrics in self.metrics())

    @contextmanager
    def frozen_engines(self) -> Iterator[None]:
        """Let requests be accepted and not be answered before the end of the block."""
        engines = [process.engine_pid() for process in self.fleet.replicas.values()]
        for engine in engines:
            os.kill(engine, signal.SIGSTOP)
        try:
            yield
        finally:
            for engine in engines:
                os.kill(engine, signal.SIGCONT)

    def spread(self, proxy: str, num: int) -> list[int]:
        """Ask one adapter so much at once; return how many requests the replicas have then."""
        body = {"model": self.adapters[0], "prompt": "hello", "max_tokens": 2}
        with self.plain(proxy) as plain, ThreadPoolExecutor(num) as threads:
            with self.frozen_engines():
                answers = [
                    threads.submit(plain.post, "/v1/completions", json=body) for _ in range(num)
                ]
                working = self.wait_for_work(num)
            assert {answer.result().status_code for answer in answers} == {200}
        return sorted(working)
