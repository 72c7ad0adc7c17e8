"""A generation as an HTTP answer, complete or streamed, and what happens when the client goes.

The first news of the engine is awaited before the status line is sent, so that a request that was
refused or failed at once gets its proper status also when it asked for a stream. A client that
disconnects makes the engine cancel; the answer then ends with the engine's terminal events.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import FinishReason, SampledToken, TokenLogprobs
from loraplex_server.api.error_table import error_body
from loraplex_server.api.errors import (
    AdapterDeleted,
    GenerationFailed,
    Overloaded,
    RequestTimedOut,
    ServerStopping,
)
from loraplex_server.api.json_text import compact
from loraplex_server.api.timings import Headers
from loraplex_server.api.usage import Usage
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.text.assembler import TextDelta

log = logging.getLogger(__name__)

_USUAL_RETRY_S: Final = 1.0
_MANY_SEQUENCES: Final = 16
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream otherwise
]


@dataclass
class Written:
    """One sequence, complete."""

    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: tuple[float, ...] | None = None

    def add(self, delta: TextDelta) -> None:
        """Append what the delta brought."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.prompt_logprobs += delta.prompt_logprobs
        self.embedding = delta.embedding or self.embedding
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self.stop_reason = delta.stop_reason


class CompleteFormat(Protocol):
    """Writes one kind of answer that is not streamed; made for one request."""

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """Return the body of the answer."""
        ...


class AnswerFormat(CompleteFormat, Protocol):
    """Writes one kind of answer, complete or streamed; made for one request."""

    def stream_head(self) -> bytes:
        """Return the events before any text."""
        ...

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """Return the event for a delta; empty when it has nothing to show."""
        ...

    def stream_tail(self, usage: Usage) -> bytes:
        """Return the events after all sequences have finished."""
        ...

    def stream_error(self, error: Exception) -> bytes:
        """Return the event of a failure in the middle of the stream."""
        ...

    @property
    def stream_end(self) -> bytes:
        """What follows the last event, whichever that is."""
        ...


class AnswerSource(Protocol):
    """Where an answer's text comes from; see `Generation`, which is one."""

    @property
    def timeout_error(self) -> RequestTimedOut: ...

    @property
    def cancel_error(self) -> AdapterDeleted | None: ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def usage(self) -> Usage: ...

    @property
    def is_abandoned(self) -> bool: ...

    def abandon(self) -> None: ...

    def close(self) -> None: ...

    async def take(self) -> list[tuple[int, TextDelta]]: ...

    def timing_headers(self, *, is_complete: bool) -> Headers: ...


class OpenAIStreamEnd:
    """How OpenAI's streams end: part of an `AnswerFormat`."""

    stream_end: Final = b"data: [DONE]\n\n"

    def stream_error(self, error: Exception) -> bytes:
        """See `AnswerFormat`."""
        return b"data: " + compact(error_body(error)).encode() + b"\n\n"


class GenerationAnswer(Response):
    """Sends one generation; a Response by its interface only, as it awaits the engine."""

    def __init__(
        self,
        generation: AnswerSource,
        answer_format: CompleteFormat,
        *,
        stream_format: AnswerFormat | None = None,
        is_engine_ready: Callable[[], bool],
        more_headers: Callable[[Usage], Headers] = lambda usage: [],
    ) -> None:
        """Prepare an answer.

        Args:
            stream_format: of a stream, the same as `answer_format`; None for a complete answer.
            more_headers: of a complete answer, beside its times.
        """
        self._generation = generation
        self._format = answer_format
        self._stream_format = stream_format
        self._more_headers = more_headers
        self._is_engine_ready = is_engine_ready
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._abandon_when_gone(receive))
        try:
            # In a task of its own: each token wakes up all callers of who waits for it, and above
            # us there are twenty of the framework's.
            await asyncio.create_task(self._send(send))
        except _ClientGone:
            return
        finally:
            watcher.cancel()
            self._generation.close()

    async def _send(self, send: Send) -> None:
        first = await self._generation.take()
        self._raise_failure(first)
        if self._generation.is_abandoned:
            return
        if self._stream_format is not None:
            await self._send_stream(self._stream_format, first, send)
        else:
            await self._send_complete(first, send)

    async def _abandon_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.abandon()

    async def _send_complete(self, deltas: list[tuple[int, TextDelta]], send: Send) -> None:
        sequences = [Written() for _ in range(self._generation.num_sequences)]
        while deltas:
            for index, delta in deltas:
                sequences[index].add(delta)
            deltas = await self._generation.take()
            self._raise_failure(deltas)
        usage = self._generation.usage
        raw = await self._written(sequences, usage)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(raw)),
            *self._generation.timing_headers(is_complete=True),
            *self._more_headers(usage),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": raw})

    async def _written(self, sequences: list[Written], usage: Usage) -> bytes:
        if len(sequences) <= _MANY_SEQUENCES:
            return compact(self._format.complete(sequences, usage)).encode()
        # Of many embeddings this takes long enough to be felt in every running stream.
        body = await asyncio.to_thread(self._format.complete, sequences, usage)
        return (await asyncio.to_thread(compact, body)).encode()

    async def _send_stream(
        self, answer_format: AnswerFormat, deltas: list[tuple[int, TextDelta]], send: Send
    ) -> None:
        headers = [*_STREAM_HEADERS, *self._generation.timing_headers(is_complete=False)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        chunk = b""
        try:
            chunk = answer_format.stream_head()
            while deltas:
                self._raise_failure(deltas)
                chunk += b"".join([answer_format.stream_delta(i, delta) for i, delta in deltas])
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = b""
                deltas = await self._generation.take()
            chunk = answer_format.stream_tail(self._generation.usage)
        except _FAILURES as error:
            chunk += answer_format.stream_error(error)
        except _ClientGone:
            raise
        except Exception as error:
            # The status is sent already: only an event can tell.
            log.error("a stream broke off", exc_info=error)
            chunk += answer_format.stream_error(error)
        await send({"type": "http.response.body", "body": chunk + answer_format.stream_end})

    def _raise_failure(self, deltas: list[tuple[int, TextDelta]]) -> None:
        """Raise what ended a sequence other than its own end, for the whole answer."""
        for _, delta in deltas:
            reason = delta.finish_reason
            if reason is None or reason in _SUCCESSFUL:
                continue
            if self._generation.is_abandoned:
                raise _ClientGone
            raise self._failure(reason, delta)

    def _failure(self, reason: FinishReason, delta: TextDelta) -> Exception:
        message = delta.message
        if reason is FinishReason.REFUSED:
            return RequestRefused(reason=message)
        if reason is FinishReason.REJECTED:
            return _overloaded(delta)
        if reason is FinishReason.TIMED_OUT:
            return self._generation.timeout_error
        if reason is FinishReason.CANCELLED:
            if self._generation.cancel_error is not None:
                return self._generation.cancel_error
            return ServerStopping(message or "the server is shutting down")
        if not self._is_engine_ready():
            return EngineUnavailable(reason=message, retry_after_s=5.0)
        return GenerationFailed(message or "the engine could not complete the request")


def _overloaded(delta: TextDelta) -> Overloaded:
    retry_after_s = delta.retry_after_s
    if retry_after_s is None or not math.isfinite(retry_after_s):
        retry_after_s = _USUAL_RETRY_S  # what the engine cannot foresee
    return Overloaded(
        delta.message or "the server is overloaded; try again later", retry_after_s=retry_after_s
    )


class _ClientGone(Exception):
    """Nobody reads the answer any more."""


_SUCCESSFUL: Final = frozenset({FinishReason.STOP, FinishReason.LENGTH})
_FAILURES: Final = (
    AdapterDeleted,
    RequestRefused,
    Overloaded,
    RequestTimedOut,
    ServerStopping,
    EngineUnavailable,
    GenerationFailed,
)
