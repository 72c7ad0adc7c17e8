"""An engine without a model, for tests of what surrounds one.

It answers a request with the prompt's own tokens, then the end token, one token per request and
step of `step_s`. `reply` replaces the echo. A request that is pooled ends with an embedding of its
own instead; one that asks for log probabilities of its prompt gets them first. It keeps the
contract of `EngineHandle`: every request gets exactly one terminal event, a cancelled one on the
next step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import (
    EndEvent,
    Event,
    FinishReason,
    Pooling,
    PromptEvent,
    Request,
    SampledToken,
    StartTimes,
    TokenEvent,
    TokenLogprobs,
)
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.messages import EngineInfo, EngineState, EngineStats, FreedMemory

END_TOKEN = 0

#: Of every request's first token or embedding.
TIMES = StartTimes(queue_s=0.25, load_s=0.5, prefill_s=0.125)

INFO = EngineInfo(
    max_model_len=256,
    num_pages=64,
    page_tokens=16,
    page_bytes=4096,
    num_layers=2,
    dtype="float32",
    device="cpu",
)


class FakeSubmission:
    def __init__(self, engine: FakeEngine, request_ids: Sequence[str]) -> None:
        self._engine = engine
        self._request_ids = request_ids

    def cancel(self, request_ids: Sequence[str] | None = None) -> None:
        self._engine.cancelled.update(self._request_ids if request_ids is None else request_ids)


class FakeEngine:
    """Implements `EngineHandle`; used from one event loop, read from the test's thread."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.reset()

    def reset(self) -> None:
        """Be as new; no request may be running."""
        self.state = EngineState.READY
        self.stats = EngineStats(pages_free=INFO.num_pages)
        self.num_restarts = 0
        self.step_s = 0.0
        self.reply: Callable[[Request], Sequence[int]] = lambda request: request.prompt_token_ids
        #: How a request ends at once, instead of being answered.
        self.end_with: EndEvent | None = None
        #: Ends requests after so many tokens, with `end_with`.
        self.end_after = 0
        #: Which requests end so.
        self.is_ending: Callable[[Request], bool] = lambda request: True
        #: Tokens of a prompt that were found in the prefix cache.
        self.num_cached: Callable[[Request], int] = lambda request: 0
        #: Holds answers back after so many events, until it is set.
        self.gate: threading.Event | None = None
        self.hold_after = 1
        #: Of each token of answers.
        self.logprob_of: Callable[[Request, int], float] = lambda request, token_id: -0.5
        self.submitted: list[Request] = []
        self.cancelled: set[str] = set()
        self.ended: dict[str, FinishReason] = {}
        self.discarded: list[str] = []
        #: What each discard frees.
        self.freed_memory = FreedMemory()
        self.kept: frozenset[str] = frozenset()
        self.tokenizer = ""
        self.prefetched: list[AdapterManifest] = []

    @property
    def info(self) -> EngineInfo:
        return INFO

    @property
    def num_running(self) -> int:
        return len(self.submitted) - len(self.ended)

    async def start(self) -> None:
        self.state = EngineState.READY

    async def stop(self) -> None:
        self.state = EngineState.STOPPED
        self.cancelled.update(request.request_id for request in self.submitted)

    def submit(self, requests: Sequence[Request], take: Callable[[Event], None]) -> FakeSubmission:
        self._check_ready()
        self.submitted += requests
        for request in requests:
            task = asyncio.create_task(self._answer(request, take))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return FakeSubmission(self, [request.request_id for request in requests])

    def discard_adapter(self, adapter_id: str) -> None:
        self.discarded.append(adapter_id)

    async def freed(self, adapter_id: str) -> FreedMemory:
        return self.freed_memory if adapter_id in self.discarded else FreedMemory()

    def keep_adapters(self, adapter_ids: frozenset[str]) -> None:
        self.kept = adapter_ids

    def learn_tokens(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def prefetch(self, manifest: AdapterManifest) -> None:
        self._check_ready()
        self.prefetched.append(manifest)

    def _check_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise EngineUnavailable(reason=f"the engine is {self.state.value}", retry_after_s=5.0)

    async def _answer(self, request: Request, take: Callable[[Event], None]) -> None:
        for num_sent, event in enumerate(self._events(request)):
            await asyncio.sleep(self.step_s)
            while num_sent >= self.hold_after and self._is_held(request):  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.005)
            if request.request_id in self.cancelled:
                event = EndEvent(request.request_id, FinishReason.CANCELLED)
            elif self.end_with and num_sent >= self.end_after and self.is_ending(request):
                event = dataclasses.replace(self.end_with, request_id=request.request_id)
            if event.finish_reason is not None:
                self.ended[request.request_id] = event.finish_reason
            take(event)
            if event.finish_reason is not None:
                return

    def _is_held(self, request: Request) -> bool:
        is_shut = self.gate is not None and not self.gate.is_set()
        return is_shut and request.request_id not in self.cancelled

    def _events(self, request: Request) -> list[Event]:
        if request.pooling is not None:
            return [_embedded(request)]
        events: list[Event] = [*self._prompt_events(request), *self._token_events(request)]
        return events

    def _prompt_events(self, request: Request) -> list[PromptEvent]:
        """Return what the prompt's tokens get, in two parts, as of a prompt computed in chunks."""
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return []
        text = request.prompt_token_ids[request.num_virtual :]
        logprobs = [one for t in text[1:] if (one := _logprobs(t, num_top)) is not None]
        half = len(logprobs) // 2
        parts = [tuple(logprobs[:half]), tuple(logprobs[half:])]
        return [PromptEvent(request.request_id, part) for part in parts if part]

    def _token_events(self, request: Request) -> list[TokenEvent]:
        token_ids = [*self.reply(request)]
        if not request.sampling.ignore_eos:
            token_ids.append(END_TOKEN)
        token_ids = (token_ids * request.sampling.max_tokens)[: request.sampling.max_tokens]
        events: list[TokenEvent] = []
        for num_sent, token_id in enumerate(token_ids, start=1):
            logprob = self.logprob_of(request, token_id)
            token = SampledToken(token_id, _logprobs(token_id, request.sampling.logprobs, logprob))
            times = TIMES if num_sent == 1 else None
            num_cached = self.num_cached(request) if num_sent == 1 else 0
            reason = FinishReason.LENGTH if num_sent == request.sampling.max_tokens else None
            if token_id == END_TOKEN and not request.sampling.ignore_eos:
                reason = FinishReason.STOP
            events.append(TokenEvent(request.request_id, token, reason, num_cached, times))
            if reason is FinishReason.STOP:
                break
        return events


def embedding_of(token_ids: Sequence[int], pooling: Pooling) -> tuple[float, ...]:
    """Return what a prompt without virtual tokens is embedded as; length 4, not normalised."""
    mean = sum(token_ids) / len(token_ids)
    return (1.0, 2.0, float(token_ids[-1]), mean if pooling is Pooling.MEAN else 0.0)


def _embedded(request: Request) -> EndEvent:
    assert request.pooling is not None, "the request is to be continued"
    embedding = embedding_of(request.prompt_token_ids[request.num_virtual :], request.pooling)
    return EndEvent(request.request_id, FinishReason.STOP, embedding=embedding, times=TIMES)


def _logprobs(token_id: int, num_top: int | None, logprob: float = -0.5) -> TokenLogprobs | None:
    if num_top is None:
        return None
    top = [(token_id, logprob), (1 + token_id % 2, float("-inf"))]
    return TokenLogprobs(logprob, tuple(top[:num_top]))
