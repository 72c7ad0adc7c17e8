"""Who waits for which request's events, from submission to the one terminal event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request
from loraplex_server.engine.messages import Cancel

SendCancel = Callable[[Cancel], None]


class ProcessRequestStream:
    """See `RequestStream`. Used from the event loop only."""

    def __init__(
        self, streams: RequestStreams, request_ids: Sequence[str], send: SendCancel
    ) -> None:
        self._streams = streams
        self._send = send
        self._live = set(request_ids)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._num_open = len(self._live)

    def push(self, event: Event) -> bool:
        """Take an event of one of our requests; True when it was the request's last."""
        self._events.put_nowait(event)
        is_last = event.finish_reason is not None
        if is_last:
            self._live.discard(event.request_id)
        return is_last

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._num_open:
            event = await self._events.get()
            self._num_open -= event.finish_reason is not None
            yield event

    def cancel(self, request_ids: Sequence[str] | None = None) -> None:
        ids = self._live if request_ids is None else self._live.intersection(request_ids)
        if ids:
            self._send(Cancel(tuple(ids)))

    async def aclose(self) -> None:
        self.cancel()
        self._streams.forget(tuple(self._live))
        self._live.clear()


class RequestStreams:
    """The streams of all live requests. Used from the event loop only.

    A request is known from `open` until its terminal event was delivered or nobody wants it, so
    no stream can get a second one.
    """

    def __init__(self, send: SendCancel) -> None:
        self._send = send
        self._by_request: dict[str, ProcessRequestStream] = {}

    def open(self, requests: Sequence[Request]) -> ProcessRequestStream:
        """Return the stream of a submission.

        Raises:
            ValueError: a request id is live; the events of two requests could not be told apart.
        """
        ids = [request.request_id for request in requests]
        if len(set(ids)) < len(ids) or not self._by_request.keys().isdisjoint(ids):
            raise ValueError(f"a request id is in use: {', '.join(ids)}")
        stream = ProcessRequestStream(self, ids, self._send)
        self._by_request.update(dict.fromkeys(ids, stream))
        return stream

    def deliver(self, events: Sequence[Event]) -> None:
        """Hand events to whom they belong; those of forgotten requests are dropped."""
        for event in events:
            stream = self._by_request.get(event.request_id)
            if stream is not None and stream.push(event):
                del self._by_request[event.request_id]

    def end_all(self, reason: FinishReason, message: str) -> None:
        """Give every live request its terminal event."""
        self.deliver([EndEvent(i, reason, message) for i in self._by_request])

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop events of these requests from now on."""
        for request_id in request_ids:
            self._by_request.pop(request_id, None)
