"""Who waits for which request's events, from submission to the one terminal event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request
from loraplex_server.engine.messages import Cancel

SendCancel = Callable[[Cancel], None]
TakeEvent = Callable[[Event], None]


class ProcessSubmission:
    """See `Submission`. Used from the event loop only."""

    def __init__(self, receivers: EventReceivers, request_ids: Sequence[str]) -> None:
        self._receivers = receivers
        self._request_ids = tuple(request_ids)

    def cancel(self, request_ids: Sequence[str] | None = None) -> None:
        """See `Submission`."""
        self._receivers.cancel(self._request_ids if request_ids is None else request_ids)


class EventReceivers:
    """The receivers of all live requests. Used from the event loop only.

    A request is known from `open` until its terminal event was delivered, so nobody can get a
    second one.
    """

    def __init__(self, send: SendCancel) -> None:
        self._send = send
        self._by_request: dict[str, TakeEvent] = {}

    def open(self, requests: Sequence[Request], take: TakeEvent) -> ProcessSubmission:
        """Hand the events of these requests to `take` from now on.

        Raises:
            ValueError: a request id is live; the events of two requests could not be told apart.
        """
        ids = [request.request_id for request in requests]
        if len(set(ids)) < len(ids) or not self._by_request.keys().isdisjoint(ids):
            raise ValueError(f"a request id is in use: {', '.join(ids)}")
        self._by_request.update(dict.fromkeys(ids, take))
        return ProcessSubmission(self, ids)

    def deliver(self, events: Iterable[Event]) -> None:
        """Hand events to whom they belong; those of requests that have ended are dropped."""
        by_request = self._by_request
        for event in events:
            take = by_request.get(event.request_id)
            if take is None:
                continue
            if event.finish_reason is not None:
                del by_request[event.request_id]
            take(event)

    def end_all(self, reason: FinishReason, message: str) -> None:
        """Give every live request its terminal event."""
        self.deliver([EndEvent(i, reason, message) for i in self._by_request])

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ask for the end of those that are live."""
        ids = tuple(i for i in request_ids if i in self._by_request)
        if ids:
            self._send(Cancel(ids))
