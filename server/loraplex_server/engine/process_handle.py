"""The engine in a process of its own, seen from the API's event loop.

When the process dies, every open request gets its one terminal event (`failed`), new ones are
refused with `EngineUnavailable`, and the process is started again, with growing pauses. Nothing
needs replaying: adapters travel with the requests that name them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import threading
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Request
from loraplex_server.engine.errors import EngineConfigError, EngineUnavailable
from loraplex_server.engine.messages import (
    Cancel,
    Command,
    DiscardAdapter,
    EngineInfo,
    EngineState,
    EngineStats,
    Ready,
    Reply,
    Shutdown,
    StartFailed,
    StepOutput,
    Submit,
)
from loraplex_server.engine.process import CoreFactory, run_engine

log = logging.getLogger(__name__)

_STOP_S = 10.0
_MAX_PAUSE_S = 30.0


class ProcessRequestStream:
    """See `RequestStream`. Used from the event loop only."""

    def __init__(self, engine: ProcessEngine, request_ids: Sequence[str]) -> None:
        self._engine = engine
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
            self._engine.send(Cancel(tuple(ids)))

    async def aclose(self) -> None:
        self.cancel()
        self._engine.forget(tuple(self._live))
        self._live.clear()


class ProcessEngine:
    """Implements `EngineHandle` over a spawned process.

    Args:
        build_core: picklable; builds the engine core inside the process.
        start_timeout_s: how long loading the model may take.
    """

    def __init__(self, build_core: CoreFactory, *, start_timeout_s: float = 600.0) -> None:
        self._build_core = build_core
        self._start_timeout_s = start_timeout_s
        self._context = multiprocessing.get_context("spawn")
        self._streams: dict[str, ProcessRequestStream] = {}
        self._state = EngineState.STOPPED
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._connection: Connection | None = None
        self._process: SpawnProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._num_restarts = 0
        # A full pipe blocks `send`; the engine's receiver thread always drains it, so not for long.
        self._send_lock = threading.Lock()

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailable(reason="the engine is starting", retry_after_s=5.0)
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def process_id(self) -> int | None:
        """Operating system id of the engine process."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._state = EngineState.STARTING
        self._supervisor = asyncio.create_task(self._supervise(ready))
        await ready

    async def stop(self) -> None:
        if self._state is EngineState.STOPPED and self._supervisor is None:
            return
        self._state = EngineState.STOPPED
        self._end_all(FinishReason.CANCELLED, "the server is stopping")
        if self._connection is not None:
            self.send(Shutdown())
        if self._supervisor is not None:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(self._supervisor), _STOP_S)
            self._supervisor.cancel()
            self._supervisor = None
        if self._process is not None and self._process.is_alive():
            self._process.kill()

    def submit(self, requests: Sequence[Request]) -> ProcessRequestStream:
        if self._state is not EngineState.READY:
            raise EngineUnavailable(
                reason=f"the engine is {self._state.value}; try again shortly", retry_after_s=5.0
            )
        stream = ProcessRequestStream(self, [request.request_id for request in requests])
        for request in requests:
            self._streams[request.request_id] = stream
        self.send(Submit(tuple(requests)))
        return stream

    def discard_adapter(self, adapter_id: str) -> None:
        if self._state is EngineState.READY:
            self.send(DiscardAdapter(adapter_id))

    def send(self, command: Command) -> None:
        """Send to the engine; a dead engine is noticed by the supervisor, not here."""
        connection = self._connection
        if connection is not None:
            with self._send_lock, contextlib.suppress(OSError, ValueError):
                connection.send(command)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop events of these requests from now on."""
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    async def _supervise(self, ready: asyncio.Future[None]) -> None:
        """Keep one engine process alive until `stop`."""
        for attempt in itertools.count():
            failure = await self._run_once(ready)
            if self._state is EngineState.STOPPED:
                return
            if not ready.done():
                self._state = EngineState.STOPPED
                ready.set_exception(EngineConfigError(failure))
                return
            log.error("the engine process died (%s); restarting it", failure)
            self._state = EngineState.RESTARTING
            self._num_restarts += 1
            self._stats = EngineStats()
            self._end_all(FinishReason.FAILED, "the engine failed and is being restarted")
            await asyncio.sleep(min(_MAX_PAUSE_S, 0.5 * 2 ** min(attempt, 6)))

    async def _run_once(self, ready: asyncio.Future[None]) -> str:
        """Run one engine process to its end and return why it ended."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=run_engine, args=(theirs, self._build_core), daemon=True, name="loraplex-engine"
        )
        process.start()
        theirs.close()
        self._connection, self._process = ours, process
        loop = asyncio.get_running_loop()
        replies: asyncio.Queue[Reply | None] = asyncio.Queue()
        reader = threading.Thread(target=_read, args=(ours, loop, replies), daemon=True)
        reader.start()
        failure = "it ended before it was ready"
        try:
            while (reply := await self._next_reply(replies)) is not None:
                if isinstance(reply, StartFailed):
                    failure = reply.message
                elif isinstance(reply, Ready):
                    self._info, self._state = reply.info, EngineState.READY
                    failure = "it stopped answering"
                    if not ready.done():
                        ready.set_result(None)
                else:
                    self._book(reply)
        finally:
            self._connection = None
            ours.close()
            await asyncio.to_thread(process.join, _STOP_S)
            if process.is_alive():
                process.kill()
        code = process.exitcode
        return failure if not code else f"{failure}; exit code {code}"

    async def _next_reply(self, replies: asyncio.Queue[Reply | None]) -> Reply | None:
        if self._state is EngineState.READY:
            return await replies.get()
        try:
            return await asyncio.wait_for(replies.get(), self._start_timeout_s)
        except TimeoutError:
            return None

    def _book(self, output: StepOutput) -> None:
        self._stats = output.stats or self._stats
        for event in output.events:
            stream = self._streams.get(event.request_id)
            if stream is not None and stream.push(event):
                del self._streams[event.request_id]

    def _end_all(self, reason: FinishReason, message: str) -> None:
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.push(EndEvent(request_id, reason, message))


def _read(
    connection: Connection, loop: asyncio.AbstractEventLoop, replies: asyncio.Queue[Reply | None]
) -> None:
    """Thread: move replies into the event loop; None when the engine is gone."""
    with contextlib.suppress(RuntimeError):  # the loop was closed under us
        try:
            while True:
                reply = connection.recv()
                loop.call_soon_threadsafe(replies.put_nowait, reply)
        except (EOFError, OSError):
            loop.call_soon_threadsafe(replies.put_nowait, None)
