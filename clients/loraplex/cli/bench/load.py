"""Making the requests of a plan, and noting what became of each.

In an open loop requests leave when they are due, whether earlier ones were answered or not, and
their times count from then: a server that stalls is not spared the requests that would have come
(no "coordinated omission"). In a closed loop each worker asks again when it was answered.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from loraplex.async_client import AsyncClient
from loraplex.cli.bench.plan import Ask
from loraplex.cli.bench.prompts import PROBES, PromptMaker, words
from loraplex.errors import APIStatusError, LoraplexError, StreamError


@dataclass
class Outcome:
    """What became of one request. Times are seconds from the start of the run.

    Attributes:
        due_s: When it was to leave; when it left, in a closed loop.
        sent_s: When it left.
        first_s: When its first token came; None if none did.
        end_s: When all was there, or it failed.
        gaps_s: Between pieces of the answer.
        error: The code or kind of its error; "" if it was answered.
    """

    ask: Ask
    due_s: float
    sent_s: float
    first_s: float | None = None
    end_s: float = 0.0
    num_prompt: int = 0
    num_output: int = 0
    gaps_s: list[float] = field(default_factory=list)
    error: str = ""


class LoadGenerator:
    """Makes requests over one client. Owned by one event loop."""

    def __init__(
        self,
        client: AsyncClient,
        prompts: PromptMaker,
        seed: int,
        on_end: Callable[[Outcome], object] = lambda outcome: None,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._rng = random.Random(seed)
        self._on_end = on_end
        self._start = time.perf_counter()

    async def run_open(self, asks: Iterable[Ask]) -> list[Outcome]:
        """Make requests when they are due."""
        self._start = time.perf_counter()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                due_s = ask.at_s or 0.0
                await asyncio.sleep(max(0.0, due_s - self._now()))
                tasks.append(group.create_task(self._make(ask, due_s)))
        return [task.result() for task in tasks]

    async def run_closed(self, asks: Iterator[Ask], concurrency: int) -> list[Outcome]:
        """Make requests, so many at a time, until the plan or its time ends."""
        self._start = time.perf_counter()
        outcomes: list[Outcome] = []

        async def work() -> None:
            # All workers draw from one plan.
            outcomes.extend([await self._make(ask, self._now()) for ask in asks])

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return outcomes

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _make(self, ask: Ask, due_s: float) -> Outcome:
        prompt = self._prompts.make(ask.prompt_len, self._rng)
        outcome = Outcome(ask, due_s, self._now())
        try:
            await self._read_answer(prompt, outcome)
        except LoraplexError as error:
            outcome.error = _kind(error)
        outcome.end_s = self._now()
        self._on_end(outcome)
        return outcome

    async def _read_answer(self, prompt: str, outcome: Outcome) -> None:
        last_s = 0.0
        async with await self._client.completions.create(
            model=outcome.ask.model,
            prompt=prompt,
            max_tokens=outcome.ask.output_len,
            ignore_eos=True,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            async for chunk in stream:
                if chunk.usage:
                    outcome.num_prompt = chunk.usage.prompt_tokens
                    outcome.num_output = chunk.usage.completion_tokens
                if not chunk.choices:
                    continue
                now = self._now()
                if outcome.first_s is None:
                    outcome.first_s = now
                else:
                    outcome.gaps_s.append(now - last_s)
                last_s = now


async def measure_prompts(client: AsyncClient, model: str) -> PromptMaker:
    """Ask the server how many tokens words take."""
    counts = []
    for num_words in PROBES:
        text = words(num_words, random.Random(num_words))
        answer = await client.completions.create(model=model, prompt=text, max_tokens=1)
        counts.append(answer.usage.prompt_tokens if answer.usage else num_words)
    return PromptMaker.fit((counts[0], counts[1]))


def _kind(error: LoraplexError) -> str:
    code = error.code if isinstance(error, APIStatusError | StreamError) else None
    return code or type(error).__name__
