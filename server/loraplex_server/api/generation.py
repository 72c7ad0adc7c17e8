"""One job in flight: the engine's events as text, and the end of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loraplex_scheduler.plan import Event, FinishReason, Request
from loraplex_server.api.errors import AdapterDeleted, Overloaded, RequestTimedOut
from loraplex_server.api.job import Job
from loraplex_server.api.job_meter import JobMeter
from loraplex_server.api.news import News
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.tenant_accounts import TenantBill
from loraplex_server.api.timings import Headers, SequenceTimes, Timings
from loraplex_server.api.usage import Usage, make_usage
from loraplex_server.engine.handle import EngineHandle, Submission
from loraplex_server.text.assembler import TextAssembler, TextDelta


class Generation:
    """The engine's events come by callback, and one task takes them as text.

    Events are booked to the engine's last one even when nobody takes text any more; so a vanished
    client never leaves an account open. The callback only books and remembers: the text is made by
    the task that waits for it, of all that came since it looked last.

    Attributes:
        timeout_error: what to answer should the time be up.
        cancel_error: what to answer should somebody else have cancelled it, if it is known why.
    """

    def __init__(
        self,
        job: Job,
        requests: tuple[Request, ...],
        assemblers: list[TextAssembler],
        *,
        timeout_error: RequestTimedOut,
        news: News,
        bill: TenantBill,
        metrics: RequestMetrics,
        meter: JobMeter,
        clock: Callable[[], float],
        on_end: Callable[[Generation], None],
    ) -> None:
        """Prepare; `on_end` is called once, when the engine has ended the last sequence.

        Args:
            news: told of every event; whoever waits for several generations gives them one.
        """
        self.timeout_error = timeout_error
        self.cancel_error: AdapterDeleted | None = None
        self.job = job
        self._requests = requests
        self._submission: Submission | None = None
        self._bill = bill
        self._ids = [request.request_id for request in requests]
        self._index_of = {request_id: index for index, request_id in enumerate(self._ids)}
        self._assemblers = assemblers
        self._metrics = metrics
        self._meter = meter
        self._clock = clock
        self._on_end = on_end
        self._times = [SequenceTimes() for _ in requests]
        self._num_running = len(requests)
        self._unfinished = set(range(len(requests)))
        self._pending: list[Event] = []
        self._news = news
        self._is_rejected = False
        self._is_abandoned = False

    def submit(self, engine: EngineHandle) -> None:
        """Hand the requests over, once; raises EngineUnavailable."""
        self._submission = engine.submit(self._requests, self._receive)

    def withdraw(self) -> None:
        """Undo what was done so far, as another part of the same answer cannot start."""
        if self._submission is None:
            self._bill.close()
        else:
            self.close()

    @property
    def num_sequences(self) -> int:
        return len(self._ids)

    @property
    def age_s(self) -> float:
        """Seconds since it arrived."""
        return self._clock() - self._requests[0].arrival_s

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        num_generated = sum(assembler.num_tokens for assembler in self._assemblers)
        return make_usage(
            num_prompt=self.job.num_prompt_tokens,
            num_generated=0 if self.job.has_no_answer else num_generated,
            # Of each prompt's first sample: the others find in the cache what that one computed.
            num_cached=sum(a.num_cached for a in self._assemblers[:: self.job.n]),
            metrics=self.timings.metrics(self._clock()),
        )

    @property
    def timings(self) -> Timings:
        """When its tokens came, so far."""
        return Timings(self._requests[0].arrival_s, tuple(self._times))

    def timing_headers(self, *, is_complete: bool) -> Headers:
        """Return the times as headers; see `Timings.headers`."""
        return self.timings.headers(self._clock(), is_complete=is_complete)

    @property
    def is_finished(self) -> bool:
        """All of its text was taken."""
        return not self._unfinished

    @property
    def is_abandoned(self) -> bool:
        return self._is_abandoned

    def abandon(self) -> None:
        """Nobody wants the rest: cancel what still runs. Idempotent."""
        if not self._is_abandoned:
            self._cancel()
        self._is_abandoned = True

    def cancel(self, error: AdapterDeleted) -> None:
        """End what still runs; the answer says why. Idempotent."""
        if self._num_running and self.cancel_error is None:
            self.cancel_error = error
            self._cancel()

    def close(self) -> None:
        """Account for what was not taken, as cancelled. Idempotent."""
        self.abandon()
        for _ in range(len(self._unfinished)):
            self._finish(self._unfinished.pop(), FinishReason.CANCELLED, self._clock())

    async def take(self) -> list[tuple[int, TextDelta]]:
        """Wait for news and return it by sequence index; empty when all have finished."""
        while self._unfinished:
            if self._pending and (deltas := self.take_ready()):
                return deltas
            await self._news.wait()
        return []

    def _receive(self, event: Event) -> None:
        """Take an event of the engine."""
        self._bill.book(self._index_of[event.request_id], event)
        self._pending.append(event)
        if event.finish_reason is not None:
            self._receive_end(event.finish_reason)
        self._news.tell()

    def _receive_end(self, reason: FinishReason) -> None:
        if reason is FinishReason.REJECTED and not self._is_rejected:
            self._is_rejected = True
            self._metrics.reject(Overloaded)
        self._num_running -= 1
        if not self._num_running:
            self._bill.close()
            self._on_end(self)

    def _cancel(self, request_ids: Sequence[str] | None = None) -> None:
        if self._submission is not None and self._num_running:
            self._submission.cancel(request_ids)

    def take_ready(self) -> list[tuple[int, TextDelta]]:
        """Return what is there by sequence index, without waiting for more."""
        events, self._pending = self._pending, []
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
            self._cancel(to_cancel)
        return deltas

    def _by_sequence(self, events: list[Event]) -> Iterable[tuple[int, list[Event]]]:
        if len(self._ids) == 1:
            return [(0, events)] if events else []
        grouped: dict[int, list[Event]] = {}
        for event in events:
            grouped.setdefault(self._index_of[event.request_id], []).append(event)
        return grouped.items()

    def _measure(self, index: int, delta: TextDelta, now: float) -> None:
        times = self._times[index]
        if delta.times is not None:
            times.start, times.first_s, times.last_s = delta.times, now, now
        if delta.tokens:
            if times.num_tokens:
                self._meter.next_tokens(now - times.last_s)
            else:
                self._meter.first_token(index, now, delta.times)
                times.first_s = now
            times.last_s = now
            times.num_tokens += len(delta.tokens)
        if delta.embedding is not None:
            self._meter.begun(index, delta.times)
        if delta.finish_reason is not None:
            self._unfinished.discard(index)
            self._finish(index, delta.finish_reason, now)

    def _finish(self, index: int, outcome: FinishReason, now: float) -> None:
        self._unfinished.discard(index)
        self._meter.finish(index, outcome, now, self._assemblers[index].num_tokens)
