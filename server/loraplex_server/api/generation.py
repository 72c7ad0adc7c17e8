"""Requests in flight: admission, the engine's events as text, and the end of each sequence.

Invariants: every accepted sequence is counted as finished exactly once, and an adapter's lease is
held from before submission until the engine sent the terminal event of the last sequence using it,
whatever happened to the client meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.api.errors import InvalidRequest, QueueFull
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.sampling import sequence_sampling
from loraplex_server.engine.handle import EngineHandle, RequestStream
from loraplex_server.text.assembler import TextAssembler, TextDelta, TextOptions
from loraplex_server.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks the engine for: `n` samples of each prompt.

    Sequence `i` is sample `i % n` of prompt `i // n`.
    """

    job_id: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: SamplingParams
    text: TextOptions
    lease: AdapterLease | None

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n


class Generations:
    """Admits jobs and remembers those in flight; used from the event loop."""

    def __init__(
        self,
        *,
        engine: EngineHandle,
        vocabulary: Vocabulary,
        metrics: RequestMetrics,
        max_sequences: int,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        """Admit up to `max_sequences` at once; each ends `timeout_s` after its arrival."""
        self._engine = engine
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._max_sequences = max_sequences
        self._timeout_s = timeout_s
        self._clock = clock
        self._pumps: set[asyncio.Task[None]] = set()
        self._num_live = 0

    @property
    def num_live(self) -> int:
        """Sequences that the engine has not ended yet."""
        return self._num_live

    def check_room(self, num_sequences: int) -> None:
        """Raise as `start` would for a job of so many sequences."""
        if num_sequences > self._max_sequences:
            raise InvalidRequest(
                f"the request asks for {num_sequences} sequences; this server takes at most "
                f"{self._max_sequences} at once",
                param="n",
            )
        if self._num_live + num_sequences > self._max_sequences:
            self._metrics.reject()
            raise QueueFull(f"{self._num_live} sequences run or wait already; try again shortly")

    def start(self, job: Job) -> Generation:
        """Hand the job to the engine; from now on the generation owns the job's lease.

        Raises:
            QueueFull, EngineUnavailable: and the lease is still the caller's.
            InvalidRequest: more sequences than could ever be admitted.
        """
        self.check_room(job.num_sequences)
        now = self._clock()
        requests = self._requests(job, now)
        stream = self._engine.submit(requests)
        self._num_live += job.num_sequences
        generation = Generation(
            stream, requests, self._assemblers(job), metrics=self._metrics, clock=self._clock
        )
        pump = asyncio.create_task(self._run(generation, job))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        return generation

    async def _run(self, generation: Generation, job: Job) -> None:
        try:
            await generation.pump()
        finally:
            self._num_live -= job.num_sequences
            if job.lease is not None:
                await asyncio.to_thread(job.lease.release)

    def _requests(self, job: Job, now: float) -> tuple[Request, ...]:
        manifest: AdapterManifest | None = job.lease.manifest if job.lease else None
        return tuple(
            Request(
                request_id=f"{job.job_id}-{index}",
                prompt_token_ids=job.prompts[index // job.n],
                sampling=sequence_sampling(job.sampling, index),
                adapter=manifest,
                arrival_s=now,
                deadline_s=now + self._timeout_s,
            )
            for index in range(job.num_sequences)
        )

    def _assemblers(self, job: Job) -> list[TextAssembler]:
        return [
            TextAssembler(
                self._vocabulary,
                job.text,
                prompt_ids=job.prompts[index // job.n],
                stop_token_ids=job.sampling.stop_token_ids,
            )
            for index in range(job.num_sequences)
        ]


class Generation:
    """One job in flight. One task pumps the engine's events, another takes them as text.

    The pump runs to the engine's last event even when nobody takes text any more; so a vanished
    client never leaves an account open.
    """

    def __init__(
        self,
        stream: RequestStream,
        requests: tuple[Request, ...],
        assemblers: list[TextAssembler],
        *,
        metrics: RequestMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._stream = stream
        self._ids = [request.request_id for request in requests]
        self._index_of = {request_id: index for index, request_id in enumerate(self._ids)}
        self._assemblers = assemblers
        self._metrics = metrics
        self._clock = clock
        self._arrival_s = requests[0].arrival_s
        self._last_token_s = [0.0] * len(requests)
        self._unfinished = set(range(len(requests)))
        self._pending: list[Event] = []
        self._wake = asyncio.Event()
        self._is_pumped = False
        self._is_abandoned = False

    @property
    def num_sequences(self) -> int:
        return len(self._ids)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, over all sequences."""
        return sum(assembler.num_tokens for assembler in self._assemblers)

    @property
    def is_abandoned(self) -> bool:
        return self._is_abandoned

    def abandon(self) -> None:
        """Nobody wants the rest: cancel what still runs. Idempotent."""
        if not self._is_abandoned and not self._is_pumped:
            self._stream.cancel()
        self._is_abandoned = True

    def close(self) -> None:
        """Account for what was not taken, as cancelled. Idempotent."""
        self.abandon()
        for _ in range(len(self._unfinished)):
            self._finish(self._unfinished.pop(), FinishReason.CANCELLED, self._clock())

    async def pump(self) -> None:
        """Collect the engine's events to the last; run by `Generations`, once."""
        try:
            async for event in self._stream:
                self._pending.append(event)
                self._wake.set()
        finally:
            self._is_pumped = True
            self._wake.set()

    async def take(self) -> list[tuple[int, TextDelta]]:
        """Wait for news and return it by sequence index; empty when all have finished."""
        while self._unfinished:
            await self._wake.wait()
            self._wake.clear()
            if deltas := self._assemble():
                return deltas
        return []

    def _assemble(self) -> list[tuple[int, TextDelta]]:
        events, self._pending = self._pending, []
        if self._is_pumped:
            events += self._missing_ends(events)
        now = self._clock()
        deltas, to_cancel = [], []
        for index, own_events in self._by_sequence(events):
            assembler = self._assemblers[index]
            delta = assembler.push(own_events)
            if delta.is_empty:
                continue
            self._measure(index, delta, now)
            deltas.append((index, delta))
            if assembler.needs_cancel:
                to_cancel.append(self._ids[index])
        if to_cancel:
            self._stream.cancel(to_cancel)
        return deltas

    def _by_sequence(self, events: list[Event]) -> Iterable[tuple[int, list[Event]]]:
        if len(self._ids) == 1:
            return [(0, events)] if events else []
        grouped: dict[int, list[Event]] = {}
        for event in events:
            grouped.setdefault(self._index_of[event.request_id], []).append(event)
        return grouped.items()

    def _missing_ends(self, events: list[Event]) -> list[Event]:
        """Return failures for sequences whose stream broke off, against its contract."""
        ended = {event.request_id for event in events if event.finish_reason is not None}
        return [
            EndEvent(self._ids[index], FinishReason.FAILED, "the engine broke off")
            for index in sorted(self._unfinished)
            if self._ids[index] not in ended
        ]

    def _measure(self, index: int, delta: TextDelta, now: float) -> None:
        if delta.tokens:
            last_s = self._last_token_s[index]
            if last_s:
                self._metrics.next_tokens(now - last_s)
            else:
                self._metrics.first_token(now - self._arrival_s)
            self._last_token_s[index] = now
        if delta.finish_reason is not None:
            self._unfinished.discard(index)
            self._finish(index, delta.finish_reason, now)

    def _finish(self, index: int, outcome: FinishReason, now: float) -> None:
        self._unfinished.discard(index)
        self._metrics.finish(outcome, now - self._arrival_s)
