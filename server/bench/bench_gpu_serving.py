"""End to end through the engine core, closed loop, no HTTP: how throughput falls with adapters.

Requests are S-LoRA's (arXiv 2311.03285, section 7.1): prompts and outputs uniform in [8, 512),
each request's adapter drawn uniformly. A fixed number of requests is in flight; after a ramp, in
which every one of them got its first token, tokens are counted for a fixed time. Adapters start on
disk and are loaded as requests name them, within the measured time, too.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.core import EngineCore

#: In the first wave outputs are cut at a random point, so that requests do not end together.
_SEED = 42


@dataclass(frozen=True)
class Lengths:
    """Half-open ranges of prompt and output lengths, in tokens."""

    prompt: tuple[int, int] = (8, 512)
    output: tuple[int, int] = (8, 512)


@dataclass(frozen=True)
class ServingResult:
    """What one arm did in its measured time; times in milliseconds."""

    arm: str
    num_adapters: int
    window_s: float
    out_tok_s: float
    req_s: float
    ttft_p50_ms: float
    gap_p50_ms: float
    num_loads: int
    num_evictions: int
    num_preemptions: int


@dataclass
class _Live:
    """One request in flight."""

    submitted_s: float
    last_token_s: float | None = None


@dataclass
class _Counts:
    """What happened since the clock was started."""

    tokens: int = 0
    finished: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


class ClosedLoop:
    """Keeps `concurrency` requests in flight in one core.

    Args:
        core: used by nobody else meanwhile.
        vocab_size: prompts are random ids of it.
        clock: seconds.
    """

    def __init__(
        self,
        core: EngineCore,
        vocab_size: int,
        *,
        concurrency: int,
        lengths: Lengths,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._core = core
        self._vocab_size = vocab_size
        self._concurrency = concurrency
        self._lengths = lengths
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._counts = _Counts()
        self._num_arms = 0

    def run(
        self,
        arm: str,
        adapters: Sequence[AdapterManifest],
        *,
        ramp_s: float,
        window_s: float,
    ) -> ServingResult:
        """Measure one arm; its requests are aborted and its adapters dropped afterwards."""
        self._num_arms += 1
        requests = self._requests(adapters)
        self._counts = _Counts()
        # Until as many requests have their first token as are in flight, at most for `ramp_s`.
        deadline = self._clock() + ramp_s
        self._drive(
            requests,
            lambda: self._clock() > deadline or len(self._counts.ttft_s) >= self._concurrency,
        )
        before = self._core.stats()
        self._counts = _Counts()
        started = self._clock()
        self._drive(requests, lambda: self._clock() > started + window_s)
        elapsed = self._clock() - started
        after = self._core.stats()
        counts = self._counts
        self._drain(adapters)
        return ServingResult(
            arm=arm,
            num_adapters=len(adapters),
            window_s=elapsed,
            out_tok_s=counts.tokens / elapsed,
            req_s=counts.finished / elapsed,
            ttft_p50_ms=1e3 * statistics.median(counts.ttft_s or [0.0]),
            gap_p50_ms=1e3 * statistics.median(counts.gaps_s or [0.0]),
            num_loads=after.num_loads - before.num_loads,
            num_evictions=after.num_evictions - before.num_evictions,
            num_preemptions=after.num_preemptions - before.num_preemptions,
        )

    def _requests(self, adapters: Sequence[AdapterManifest]) -> Iterator[Request]:
        """Yield requests without end: lengths and prompts are the same for every arm."""
        lengths, choices = random.Random(_SEED), random.Random(_SEED + 1)
        number = 0
        while True:
            num_prompt = lengths.randrange(*self._lengths.prompt)
            num_output = lengths.randrange(*self._lengths.output)
            if number < self._concurrency:
                num_output = lengths.randint(1, num_output)
            prompt = tuple(lengths.choices(range(3, self._vocab_size), k=num_prompt))
            adapter = adapters[choices.randrange(len(adapters))] if adapters else None
            sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
            name = f"{self._num_arms}-{number}"
            yield Request(name, prompt, sampling, adapter, arrival_s=time.monotonic())
            number += 1

    def _drive(self, requests: Iterator[Request], is_over: Callable[[], bool]) -> None:
        while not is_over():
            while len(self._live) < self._concurrency:
                request = next(requests)
                self._live[request.request_id] = _Live(self._clock())
                self._book(self._core.add(request))
            self._book(self._core.step(load_timeout_s=0.05))

    def _book(self, events: Sequence[Event]) -> None:
        now = self._clock()
        for event in events:
            live = self._live.get(event.request_id)
            if live is None:
                continue
            if isinstance(event, EndEvent):
                if event.finish_reason is not FinishReason.CANCELLED:
                    raise RuntimeError(f"a request of the benchmark failed: {event}")
            elif isinstance(event, TokenEvent):
                since = live.submitted_s if live.last_token_s is None else live.last_token_s
                times = self._counts.ttft_s if live.last_token_s is None else self._counts.gaps_s
                times.append(now - since)
                live.last_token_s = now
                self._counts.tokens += 1
            if event.finish_reason is not None:
                self._counts.finished += 1
                del self._live[event.request_id]

    def _drain(self, adapters: Sequence[AdapterManifest]) -> None:
        for request_id in list(self._live):
            self._core.abort(request_id)
        self._live.clear()
        while self._core.has_work:
            self._core.step(load_timeout_s=0.05)
        for adapter in adapters:
            self._core.discard_adapter(adapter.adapter_id)
