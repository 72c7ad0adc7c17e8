"""One request answered by several models, each by itself: one answer with all their choices.

Sequences are numbered through: those of the first model, then those of the second. Either all
models are admitted or none, and what ends one of them early ends the answer.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final

from loraplex_scheduler.plan import FinishReason
from loraplex_server.api.answer import AnswerFormat, OpenAIStreamEnd, Written
from loraplex_server.api.errors import AdapterDeleted, RequestTimedOut
from loraplex_server.api.generation import Generation
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.news import News
from loraplex_server.api.timings import Headers, Timings
from loraplex_server.api.usage import Usage, add_usages
from loraplex_server.text.assembler import TextDelta

#: Endings that say why in the engine's words, which do not know how many models were asked.
_EXPLAINED: Final = frozenset({FinishReason.REFUSED, FinishReason.REJECTED, FinishReason.FAILED})
#: What a format writes beside its choices although it is one model's.
_OF_ONE_MODEL: Final = ("prompt_token_ids", "prompt_logprobs")


class FanOut:
    """Several generations as one; implements `AnswerSource`."""

    def __init__(
        self, generations: Sequence[Generation], news: News, clock: Callable[[], float]
    ) -> None:
        """Join generations that tell their events to the same `news`."""
        self._generations = generations
        self._news = news
        self._clock = clock
        self._offsets = _offsets([generation.job for generation in generations])

    @property
    def timeout_error(self) -> RequestTimedOut:
        return self._generations[0].timeout_error

    @property
    def cancel_error(self) -> AdapterDeleted | None:
        errors = (generation.cancel_error for generation in self._generations)
        return next((error for error in errors if error is not None), None)

    @property
    def num_sequences(self) -> int:
        return sum(generation.num_sequences for generation in self._generations)

    @property
    def usage(self) -> Usage:
        """What all of it has cost so far."""
        usages = [generation.usage for generation in self._generations]
        return add_usages(usages, self._timings().metrics(self._clock()))

    @property
    def is_abandoned(self) -> bool:
        return any(generation.is_abandoned for generation in self._generations)

    def abandon(self) -> None:
        """See `Generation`."""
        for generation in self._generations:
            generation.abandon()

    def close(self) -> None:
        """See `Generation`."""
        for generation in self._generations:
            generation.close()

    def timing_headers(self, *, is_complete: bool) -> Headers:
        """See `Generation`."""
        return self._timings().headers(self._clock(), is_complete=is_complete)

    async def take(self) -> list[tuple[int, TextDelta]]:
        """See `Generation`: news of any model, as soon as there are any."""
        while not all(generation.is_finished for generation in self._generations):
            if deltas := self._take_ready():
                return deltas
            await self._news.wait()
        return []

    def _take_ready(self) -> list[tuple[int, TextDelta]]:
        deltas = []
        for generation, offset in zip(self._generations, self._offsets, strict=True):
            for index, delta in generation.take_ready():
                if delta.finish_reason in _EXPLAINED:
                    delta.message = f"`{generation.job.model}`: {delta.message or 'it failed'}"
                deltas.append((offset + index, delta))
        return deltas

    def _timings(self) -> Timings:
        return Timings.merge(generation.timings for generation in self._generations)


class FanOutFormat(OpenAIStreamEnd):
    """Implements `AnswerFormat` over the formats of each model, in OpenAI's shapes.

    Choices are numbered through and say whose they are in `model`; the answer's own `model` has all
    names, with commas, which no name has.
    """

    def __init__(self, jobs: Sequence[Job], formats: Sequence[AnswerFormat]) -> None:
        self._jobs = jobs
        self._formats = formats
        self._offsets = _offsets(jobs)
        self._names = ",".join(job.model for job in jobs)

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        bodies: list[dict[str, Any]] = []
        choices: list[dict[str, Any]] = []
        for job, part, offset in zip(self._jobs, self._formats, self._offsets, strict=True):
            body = part.complete(sequences[offset : offset + job.num_sequences], usage)
            own: dict[str, Any] = {name: body.pop(name) for name in _OF_ONE_MODEL if name in body}
            for choice in body["choices"]:
                choices.append({**choice, **own, "index": len(choices), "model": job.model})
            bodies.append(body)
        return {**bodies[0], "model": self._names, "choices": choices}

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        heads = enumerate(part.stream_head() for part in self._formats)
        return b"".join([self._renumber(which, head) for which, head in heads])

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`."""
        which = bisect_right(self._offsets, index) - 1
        events = self._formats[which].stream_delta(index - self._offsets[which], delta)
        return self._renumber(which, events)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        tail = self._formats[0].stream_tail(usage)
        return _rewritten(tail, lambda chunk: chunk.update(model=self._names))

    def _renumber(self, which: int, events: bytes) -> bytes:
        """Return one model's events with the indexes of the whole answer."""

        def renumber(chunk: dict[str, Any]) -> None:
            for choice in chunk["choices"]:
                choice["index"] += self._offsets[which]
                choice["model"] = self._jobs[which].model

        return _rewritten(events, renumber)


def _offsets(jobs: Sequence[Job]) -> list[int]:
    """Return the number of each job's first sequence."""
    return [0, *itertools.accumulate(job.num_sequences for job in jobs[:-1])]


def _rewritten(events: bytes, rewrite: Callable[[dict[str, Any]], None]) -> bytes:
    """Return server-sent events whose JSON was changed.

    A second trip through JSON per event, which only these answers pay: formats need not know them.
    """
    written = []
    for event in events.split(b"\n\n")[:-1]:
        chunk = json.loads(event.removeprefix(b"data: "))
        rewrite(chunk)
        written.append(b"data: " + compact(chunk).encode() + b"\n\n")
    return b"".join(written)
