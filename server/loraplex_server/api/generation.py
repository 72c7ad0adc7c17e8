"""One job in flight: the engine's events as text, and the end of each sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request
from loraplex_server.api.errors import AdapterDeleted, Overloaded, RequestTimedOut
from loraplex_server.api.job import Job
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.tenant_accounts import TenantBill
from loraplex_server.api.usage import Usage, make_usage
from loraplex_server.engine.handle import RequestStream
from loraplex_server.text.assembler import TextAssembler, TextDelta


class Generation:
    """One task pumps the engine's events, another takes them as text.

    The pump runs to the engine's last event even when nobody takes text any more; so a vanished
    client never leaves an account open.

    Attributes:
        timeout_error: what to answer should the time be up.
        cancel_error: what to answer should somebody else have cancelled it, if it is known why.
    """

    def __init__(
        self,
        job: Job,
        stream: RequestStream,
        requests: tuple[Request, ...],
        assemblers: list[TextAssembler],
        *,
        timeout_error: RequestTimedOut,
        bill: TenantBill,
        metrics: RequestMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.timeout_error = timeout_error
        self.cancel_error: AdapterDeleted | None = None
        self._job = job
        self._stream = stream
        self._bill = bill
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
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return make_usage(
            num_prompt=self._job.num_prompt_tokens,
            num_generated=sum(assembler.num_tokens for assembler in self._assemblers),
            # Of each prompt's first sample: the others find in the cache what that one computed.
            num_cached=sum(a.num_cached for a in self._assemblers[:: self._job.n]),
        )

    @property
    def is_abandoned(self) -> bool:
        return self._is_abandoned

    def abandon(self) -> None:
        """Nobody wants the rest: cancel what still runs. Idempotent."""
        if not self._is_abandoned and not self._is_pumped:
            self._stream.cancel()
        self._is_abandoned = True

    def cancel(self, error: AdapterDeleted) -> None:
        """End what still runs; the answer says why. Idempotent."""
        if not self._is_pumped and self.cancel_error is None:
            self.cancel_error = error
            self._stream.cancel()

    def close(self) -> None:
        """Account for what was not taken, as cancelled. Idempotent."""
        self.abandon()
        for _ in range(len(self._unfinished)):
            self._finish(self._unfinished.pop(), FinishReason.CANCELLED, self._clock())

    async def pump(self) -> None:
        """Collect the engine's events to the last; run by `Generations`, once."""
        is_rejected = False
        try:
            async for event in self._stream:
                self._bill.book(self._index_of[event.request_id], event)
                if event.finish_reason is FinishReason.REJECTED and not is_rejected:
                    is_rejected = True
                    self._metrics.reject(Overloaded)
                self._pending.append(event)
                self._wake.set()
        finally:
            self._bill.close()
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
