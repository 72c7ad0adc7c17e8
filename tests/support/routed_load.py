"""Clients of a whole fleet, through its proxy: what each asked for, got, and how long it took.

Some use our SDK with its retries, the others are plain HTTP clients that try nothing twice. All is
greedy, so each question has one right answer, whichever replica gives it and in whatever company.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import httpx

from loraplex import AsyncClient, LoraplexError

#: What proxies tell of who answered.
REPLICA_HEADER = "X-Loraplex-Replica"
#: Far more than any request here takes; one that takes longer hangs.
HANG_S = 60.0
_NUM_PROMPTS = 8
#: Of each client between requests.
_RESTING_S = 2.0


@dataclass(frozen=True)
class Failure:
    """A request that did not end well.

    Attributes:
        replica: whose answer broke off, as the proxy calls it; None if there was none.
        had_begun: some of the answer had come.
    """

    kind: str
    reason: str
    replica: str | None = None
    had_begun: bool = False


@dataclass
class Outcomes:
    """What became of all requests so far."""

    done: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    texts: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    slowest_s: float = 0.0

    @property
    def num_done(self) -> int:
        return self.done.total()

    @property
    def contradictions(self) -> dict[tuple[str, str], set[str]]:
        """Questions (adapter and prompt) that got different answers."""
        return {asked: texts for asked, texts in self.texts.items() if len(texts) > 1}


@dataclass(frozen=True)
class _Door:
    """How the fleet is asked through one proxy."""

    sdk: AsyncClient
    http: httpx.AsyncClient


class RoutedLoad:
    """Used from one event loop; clients take the proxies in turn."""

    def __init__(
        self, urls: Sequence[str], key: str, adapters: Sequence[str], *, seed: int = 0
    ) -> None:
        self.outcomes = Outcomes()
        self._pause_s = 0.0
        self._random = random.Random(seed)
        self._adapters = adapters
        self._has_ended = asyncio.Event()
        headers = {"Authorization": f"Bearer {key}"}
        self._doors = [
            _Door(
                AsyncClient(base_url=url, api_key=key, timeout=HANG_S),
                httpx.AsyncClient(base_url=url, timeout=HANG_S, headers=headers),
            )
            for url in urls
        ]
        self._kinds: dict[str, Callable[[_Door, str, str], Awaitable[str | None]]] = {
            "sdk whole": self._sdk_whole,
            "sdk stream": self._sdk_stream,
            "sdk read": self._sdk_read,
            "plain whole": self._plain_whole,
            "plain stream": self._plain_stream,
        }

    @asynccontextmanager
    async def running(self, concurrency: int):
        """Keep so many requests under way during the block, and let the last ones end."""
        is_over = asyncio.Event()
        doors = [self._doors[number % len(self._doors)] for number in range(concurrency)]
        try:
            async with asyncio.TaskGroup() as workers:
                for door in doors:
                    workers.create_task(self._work(door, is_over))
                try:
                    yield self
                finally:
                    is_over.set()
        finally:
            for door in self._doors:
                await door.sdk.close()
                await door.http.aclose()

    @contextmanager
    def resting(self):
        """Pause clients during the block: a server that starts needs what cores there are."""
        self._pause_s = _RESTING_S
        try:
            yield
        finally:
            self._pause_s = 0.0

    async def wait_for(self, num_more: int) -> None:
        """Wait until so many more requests have ended."""
        enough = self.outcomes.num_done + num_more
        async with asyncio.timeout(120):
            while self.outcomes.num_done < enough:
                self._has_ended.clear()
                await self._has_ended.wait()

    async def _work(self, door: _Door, is_over: asyncio.Event) -> None:
        outcomes = self.outcomes
        while not is_over.is_set():
            kind = self._random.choice([*self._kinds])
            name = self._random.choice(self._adapters)
            prompt = f"Of {self._random.randrange(_NUM_PROMPTS)}: hello"
            start = time.monotonic()
            try:
                async with asyncio.timeout(HANG_S):
                    text = await self._kinds[kind](door, name, prompt)
            except (LoraplexError, httpx.HTTPError, TimeoutError, AssertionError) as error:
                outcomes.failures.append(
                    Failure(
                        kind,
                        repr(error),
                        getattr(error, "replica", None),
                        getattr(error, "had_begun", False),
                    )
                )
            else:
                if text is not None:
                    outcomes.texts.setdefault((name, prompt), set()).add(text)
            outcomes.slowest_s = max(outcomes.slowest_s, time.monotonic() - start)
            outcomes.done[kind] += 1
            self._has_ended.set()
            await asyncio.sleep(self._pause_s)

    def _options(self) -> dict[str, object]:
        return {"max_tokens": 96, "temperature": 0, "ignore_eos": True}

    async def _sdk_whole(self, door: _Door, name: str, prompt: str) -> str:
        answer = await door.sdk.completions.create(model=name, prompt=prompt, **self._options())
        return answer.text

    async def _sdk_stream(self, door: _Door, name: str, prompt: str) -> str:
        create = door.sdk.completions.create
        stream = await create(model=name, prompt=prompt, stream=True, **self._options())
        try:
            return "".join([piece async for piece in stream.text])
        except LoraplexError as error:
            raise _told(error, stream.response) from error

    async def _sdk_read(self, door: _Door, name: str, prompt: str) -> None:
        assert (await door.sdk.adapters.get(name)).name == name

    async def _plain_whole(self, door: _Door, name: str, prompt: str) -> str:
        body = {"prompt": prompt, "model": name, **self._options()}
        answer = await door.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def _plain_stream(self, door: _Door, name: str, prompt: str) -> str:
        body = {"prompt": prompt, "model": name, "stream": True, **self._options()}
        async with door.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            try:
                lines = [line[6:] async for line in answer.aiter_lines() if line]
                assert lines[-1:] == ["[DONE]"], lines[-1:]
                events = [json.loads(line) for line in lines[:-1]]
                assert not any("error" in event for event in events), events[-1]
            except (httpx.HTTPError, AssertionError) as error:
                raise _told(error, answer) from error
        return "".join(event["choices"][0]["text"] for event in events)


class _BrokenAnswer(AssertionError):
    """An answer that had begun broke off."""

    had_begun = True

    def __init__(self, reason: str, replica: str | None) -> None:
        self.replica = replica
        super().__init__(reason)


def _told(error: Exception, answer: httpx.Response) -> _BrokenAnswer:
    return _BrokenAnswer(repr(error), answer.headers.get(REPLICA_HEADER))
