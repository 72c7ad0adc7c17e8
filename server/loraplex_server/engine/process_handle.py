"""The engine in a process of its own, seen from the API's event loop.

When the process dies, every open request gets its one terminal event (`failed`), new ones are
refused with `EngineUnavailable`, and the process is started again, with growing pauses. Nothing
needs replaying: adapters travel with the requests that name them.

One task, the supervisor, starts and ends processes. `stop` sets `_is_stopping`, which ends every
wait of that task, and nothing but the supervisor's end follows from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import FinishReason, Request
from loraplex_server.engine.child import EngineChild
from loraplex_server.engine.discards import DiscardAnswers
from loraplex_server.engine.errors import EngineConfigError, EngineUnavailable
from loraplex_server.engine.event_receivers import EventReceivers, ProcessSubmission, TakeEvent
from loraplex_server.engine.messages import (
    AdapterDiscarded,
    Command,
    DiscardAdapter,
    EngineInfo,
    EngineState,
    EngineStats,
    FreedMemory,
    KeepAdapters,
    LearnTokens,
    PrefetchAdapter,
    Reply,
    Shutdown,
    StartFailed,
    StepOutput,
    Submit,
)
from loraplex_server.engine.process import CoreFactory

log = logging.getLogger(__name__)

#: How long a process may take to end by itself before it is killed.
_STOP_S = 10.0

#: What a start is taken to last before one was seen, and what nobody is asked to wait less than.
_USUAL_START_S = 5.0
_MIN_RETRY_S = 1.0


class RestartPauses:
    """How long to wait before each restart: twice as long after each run that ended early."""

    SHORTEST_S = 0.5
    LONGEST_S = 30.0
    #: A run that served so long was a good one: its end is no part of a series of failures.
    GOOD_RUN_S = 60.0

    def __init__(self) -> None:
        self._num_early = 0

    def next_s(self, ready_s: float) -> float:
        """Return the pause after a run that was ready for `ready_s` seconds."""
        if ready_s >= self.GOOD_RUN_S:
            self._num_early = 0
        pause_s = min(self.LONGEST_S, self.SHORTEST_S * 2.0 ** min(self._num_early, 16))
        self._num_early += 1
        return pause_s


class ProcessEngine:
    """Implements `EngineHandle` over a spawned process; is started once and stopped once.

    Args:
        build_core: picklable; builds the engine core inside the process.
        start_timeout_s: how long loading the model may take.
    """

    def __init__(self, build_core: CoreFactory, *, start_timeout_s: float = 600.0) -> None:
        self._build_core = build_core
        self._start_timeout_s = start_timeout_s
        self._receivers = EventReceivers(self._send)
        self._discards = DiscardAnswers()
        self._kept: frozenset[str] = frozenset()
        self._tokenizer: str | None = None
        self._state = EngineState.STOPPED
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._num_restarts = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._child: EngineChild | None = None
        self._is_stopping = asyncio.Event()
        # Of the process that runs now.
        self._is_ready = asyncio.Event()
        self._start_failure = ""
        # For telling clients when to come back.
        self._start_s = _USUAL_START_S
        self._ready_expected_at = 0.0

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise self._unavailable("the engine is starting")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def process_id(self) -> int | None:
        """Operating system id of the engine process; None while there is none."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """See `EngineHandle`; raises EngineUnavailable when it is stopped meanwhile."""
        assert self._supervisor is None, "an engine is started once"
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._state = EngineState.STARTING
        self._supervisor = asyncio.create_task(self._supervise(started))
        await started

    async def stop(self) -> None:
        self._is_stopping.set()
        self._state = EngineState.STOPPED
        self._receivers.end_all(FinishReason.CANCELLED, "the server is stopping")
        if self._supervisor is None:
            return
        try:
            await asyncio.wait([self._supervisor])
        finally:
            if self._child is not None:
                self._child.kill()

    def submit(self, requests: Sequence[Request], take: TakeEvent) -> ProcessSubmission:
        """See `EngineHandle`; raises ValueError when a request id is live."""
        self._check_ready()
        submission = self._receivers.open(requests, take)
        self._send(Submit(tuple(requests)))
        return submission

    def discard_adapter(self, adapter_id: str) -> None:
        if self._state is EngineState.READY:
            self._discards.expect(adapter_id)
            self._send(DiscardAdapter(adapter_id))

    async def freed(self, adapter_id: str) -> FreedMemory:
        """See `EngineHandle`."""
        return await self._discards.freed(adapter_id)

    def keep_adapters(self, adapter_ids: frozenset[str]) -> None:
        """See `EngineHandle`."""
        self._kept = adapter_ids
        if self._state is EngineState.READY:
            self._send(KeepAdapters(adapter_ids))

    def learn_tokens(self, tokenizer: str) -> None:
        """See `EngineHandle`."""
        self._tokenizer = tokenizer
        if self._state is EngineState.READY:
            self._send(LearnTokens(tokenizer))

    def prefetch(self, manifest: AdapterManifest) -> None:
        """See `EngineHandle`."""
        self._check_ready()
        self._send(PrefetchAdapter(manifest))

    def _check_ready(self) -> None:
        if self._state is not EngineState.READY:
            raise self._unavailable(f"the engine is {self._state.value}; try again shortly")

    def _send(self, command: Command) -> None:
        if self._child is not None:
            self._child.send(command)

    def _unavailable(self, reason: str) -> EngineUnavailable:
        wait_s = self._ready_expected_at - time.monotonic()
        return EngineUnavailable(reason=reason, retry_after_s=max(_MIN_RETRY_S, wait_s))

    # ---- the supervisor --------------------------------------------------------------------

    async def _supervise(self, started: asyncio.Future[None]) -> None:
        """Keep one engine process alive until `stop`, or until the first one fails to start."""
        pauses = RestartPauses()
        try:
            while not self._is_stopping.is_set():
                failure, ready_s = await self._run_once(started)
                if self._is_stopping.is_set():
                    return
                if not started.done():
                    started.set_exception(EngineConfigError(failure))
                    return
                pause_s = pauses.next_s(ready_s)
                log.error("the engine process died (%s); restart in %.1f s", failure, pause_s)
                self._num_restarts += 1
                self._ready_expected_at = time.monotonic() + pause_s + self._start_s
                await _first_of(self._is_stopping, timeout_s=pause_s)
        except Exception:
            log.exception("the engine's supervisor failed")
        finally:
            self._state = EngineState.STOPPED
            self._receivers.end_all(FinishReason.FAILED, "the engine has stopped")
            if not started.done():
                started.set_exception(self._unavailable("the engine was stopped"))

    async def _run_once(self, started: asyncio.Future[None]) -> tuple[str, float]:
        """Run one engine process to its end; return why it ended and how long it was ready."""
        self._is_ready.clear()
        self._start_failure = "it ended before it was ready"
        self._ready_expected_at = time.monotonic() + self._start_s
        try:
            child = self._child = EngineChild(self._build_core, self._receive)
        except Exception as error:  # noqa: BLE001  (a run's top frame: becomes its failure)
            return f"it could not be spawned: {error}", 0.0
        ready_s = 0.0
        try:
            failure = await self._watch_start(child, started)
            if failure is None:
                ready_at = time.monotonic()
                await _first_of(child.gone, self._is_stopping)
                failure, ready_s = "it stopped answering", time.monotonic() - ready_at
        finally:
            self._lose_requests()
            child.send(Shutdown())
            # One that loads a model would not read this in time, and has nothing to lose.
            can_end = self._is_ready.is_set() or child.gone.is_set()
            exit_code = await child.end(_STOP_S if can_end else 0.0)
            self._child = None
        return failure + (f"; exit code {exit_code}" if exit_code else ""), ready_s

    async def _watch_start(self, child: EngineChild, started: asyncio.Future[None]) -> str | None:
        """Wait until the process is ready; return why it never will be, or None."""
        spawned_at = time.monotonic()
        await _first_of(
            self._is_ready, child.gone, self._is_stopping, timeout_s=self._start_timeout_s
        )
        if self._is_stopping.is_set():
            return "it was stopped"
        if self._is_ready.is_set():
            self._start_s = time.monotonic() - spawned_at
            if not started.done():
                started.set_result(None)
            return None
        if child.gone.is_set():
            return self._start_failure
        return f"it was not ready after {self._start_timeout_s:g} s"

    def _lose_requests(self) -> None:
        """The process is gone or about to be: refuse requests, end those that it had."""
        if self._state is EngineState.READY:
            self._state = EngineState.RESTARTING
        self._stats = EngineStats()
        self._discards.end_all()
        self._receivers.end_all(FinishReason.FAILED, "the engine failed and is being restarted")

    def _receive(self, reply: Reply) -> None:
        if self._is_stopping.is_set():
            return
        if isinstance(reply, StepOutput):
            self._stats = reply.stats or self._stats
            self._receivers.deliver(reply.events)
        elif isinstance(reply, AdapterDiscarded):
            self._discards.take(reply)
        elif isinstance(reply, StartFailed):
            self._start_failure = reply.message
        else:
            self._info, self._state = reply.info, EngineState.READY
            if self._kept:
                self._send(KeepAdapters(self._kept))
            if self._tokenizer is not None:
                self._send(LearnTokens(self._tokenizer))
            self._is_ready.set()


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Wait until one of the events is set, or for so long."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
