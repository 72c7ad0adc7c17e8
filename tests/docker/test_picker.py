"""What the endpoint picker makes of our metrics: its rules against three real replicas."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.endpoint_picker import Endpoint, Picker, lora_affinity
from tests.support.tiny_serving import NAME, TinyServer, save_tiny_adapter

CHART = Path(__file__).resolve().parents[2] / "docker" / "helm" / "loraplex"
CONFIG = CHART / "files" / "epp-config.yaml"
ADAPTERS = ("wanted", *(f"a{i}" for i in range(1, 20)))
#: Pages of 16 tokens: for 18 adapters of 4 pages and 3 for keys and values, or one sequence of 1024
#: tokens and 2 adapters.
NUM_PAGES = 75
WAIT_S = 60.0


class Replicas:
    """Three of them, each with all adapters on its disk, and a picker that watches them."""

    def __init__(self, servers: Sequence[TinyServer], http: httpx.Client) -> None:
        self.urls = [server.base_url for server in servers]
        self.picker = Picker(yaml.safe_load(CONFIG.read_text()))
        self._http = http

    def ask(self, replica: int, model: str, num_prompt: int = 4, max_tokens: int = 1) -> None:
        """Complete a prompt of so many tokens; an answer is an answer, however long it took."""
        prompt = [5 + i % 50 for i in range(num_prompt)]
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        answer = self._http.post(f"{self.urls[replica]}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text

    def look(self) -> list[Endpoint]:
        """Scrape all of them."""
        return [self.picker.endpoint(self._http.get(f"{u}/metrics").text) for u in self.urls]

    def resident(self, replica: int) -> set[str]:
        """Return the adapters in the pool by the map of the pool, which is no metric."""
        holders = self._http.get(f"{self.urls[replica]}/v1/pool").json()["by_adapter"]
        return {holder["name"] for holder in holders if holder["weight_pages"]}

    def wait_for(self, condition: Callable[[list[Endpoint]], bool]) -> list[Endpoint]:
        """Return the first look at them for which this holds."""
        deadline = time.monotonic() + WAIT_S
        while not condition(seen := self.look()):
            assert time.monotonic() < deadline, seen
            time.sleep(0.02)
        return seen

    @contextmanager
    def load(self, replica: int, models: Sequence[str], **wish: int) -> Iterator[None]:
        """Ask a replica for each of the models, again and again, each from a thread of its own."""
        is_over = threading.Event()

        def go_on(model: str) -> None:
            while not is_over.is_set():
                self.ask(replica, model, **wish)

        threads = [threading.Thread(target=go_on, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        self.wait_for(lambda seen: not seen[replica].num_running + seen[replica].num_waiting)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    adapters = [save_tiny_adapter(folder / name, seed=i) for i, name in enumerate(ADAPTERS)]
    flags = ("--max-running", "2", "--page-tokens", "16")
    with ExitStack() as ends:
        servers = []
        for name in ("first", "second", "third"):
            size = str(NUM_PAGES * 8192)
            servers.append(TinyServer(folder / name, *flags, pool_bytes=size))
            ends.callback(servers[-1].stop)
        ends.callback(lambda: [server.process.terminate() for server in servers])
        for server in servers:
            server.wait_until_ready(timeout_s=600)
            for adapter in adapters:
                files = [("files", (path.name, path.read_bytes())) for path in adapter.iterdir()]
                url = f"{server.base_url}/v1/adapters"
                answer = httpx.post(url, data={"name": adapter.name}, files=files, timeout=WAIT_S)
                assert answer.status_code == 201, answer.text
        yield Replicas(servers, ends.enter_context(httpx.Client(timeout=WAIT_S)))


def test_it_finds_every_series_it_is_told_to_read(replicas):
    for endpoint in replicas.look():
        assert (endpoint.block_size, endpoint.num_blocks) == (16, NUM_PAGES)
        assert (endpoint.num_waiting, endpoint.num_running, endpoint.kv_usage) == (0, 0, 0.0)
        assert endpoint.max_active > 0


def test_the_replica_with_the_adapter_is_first_one_with_room_next_and_a_full_one_last(replicas):
    replicas.ask(0, "wanted")
    replicas.wait_for(lambda seen: "wanted" in seen[0].active)
    # One sequence has nearly all pages of the third one, and others wait for them.
    with replicas.load(2, ADAPTERS[1:4], num_prompt=960, max_tokens=40):
        seen = replicas.wait_for(lambda seen: lora_affinity("wanted", seen)[2] == 0.0)
        assert lora_affinity("wanted", seen) == [1.0, 0.8, 0.0]
        scores = replicas.picker.scores("wanted", seen)
        assert scores[0] > scores[1] > scores[2]
        # For the base model, or an adapter that nobody has, those with room are equal.
        assert lora_affinity("a19", seen)[:2] == lora_affinity(NAME, seen)[:2] == [0.8, 0.8]


def test_a_replica_full_of_adapters_that_nobody_uses_has_room(replicas):
    """One more has to evict one, which waits for nobody: better than one that is busy."""
    replicas.ask(0, "wanted")
    for name in ADAPTERS[1:]:
        replicas.ask(1, name)
    seen = replicas.wait_for(lambda seen: not seen[1].num_running + seen[1].num_waiting)
    assert len(seen[1].active) == 18
    assert seen[1].active == replicas.resident(1)
    assert lora_affinity("wanted", seen)[:2] == [1.0, 0.8]


def test_a_replica_with_a_queue_is_left_for_one_without(replicas):
    replicas.ask(0, "wanted")
    with replicas.load(0, ["wanted"] * 5, max_tokens=200):
        # A look may fall between the end of one and the beginning of the next.
        seen = replicas.wait_for(lambda seen: seen[0].num_waiting and seen[0].num_running == 2)
        assert "wanted" in seen[0].active
        scores = replicas.picker.scores("wanted", seen)
        assert max(scores) == max(scores[1:])
    seen = replicas.look()
    scores = replicas.picker.scores("wanted", seen)
    assert scores[0] > max(scores[1:]), "it comes back when the queue is gone"


def test_what_is_ready_and_what_is_waited_for_are_disjoint_and_true(replicas):
    waited: set[str] = set()
    with replicas.load(2, ADAPTERS[1:6], num_prompt=960, max_tokens=20):
        for _ in range(100):
            third = replicas.look()[2]
            assert not third.active & third.waiting
            waited |= third.waiting
            if len(waited) > 1:
                break
    assert waited
    assert waited <= set(ADAPTERS[1:6])
    third = replicas.wait_for(lambda seen: not seen[2].waiting)[2]
    assert third.active == replicas.resident(2)
