"""The API process's end of the engine: submit requests, receive events, survive its death."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import Event, Request
from loraplex_server.engine.messages import EngineInfo, EngineState, EngineStats, FreedMemory


class RequestStream(Protocol):
    """Events of one submission (one or several requests), in order per request.

    Ends after the terminal event of every request: each gets exactly one, also when the engine
    dies. Closing it early cancels what still runs.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self, request_ids: Sequence[str] | None = None) -> None:
        """Ask the engine to end these requests (default: all); their `cancelled` events follow."""
        ...

    async def aclose(self) -> None:
        """Cancel what still runs and forget about it. Idempotent."""
        ...


class EngineHandle(Protocol):
    """What the API needs of an engine, wherever it runs; used from one event loop."""

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> EngineInfo:
        """Raises EngineUnavailable before the engine was ready for the first time."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def num_restarts(self) -> int: ...

    async def start(self) -> None:
        """Start the engine and wait until it is ready; raises EngineConfigError if it cannot."""
        ...

    async def stop(self) -> None:
        """End every request as cancelled, then the engine. Idempotent."""
        ...

    def submit(self, requests: Sequence[Request]) -> RequestStream:
        """Hand over requests; raises EngineUnavailable when the engine is not ready."""
        ...

    def discard_adapter(self, adapter_id: str) -> None:
        """Have the memory of a deleted adapter freed as soon as nobody runs on it."""
        ...

    async def freed(self, adapter_id: str) -> FreedMemory:
        """Wait until the latest `discard_adapter` of it is done; return what that freed.

        Nothing, if the engine's process ended meanwhile, and its memory with it.
        """
        ...

    def keep_adapters(self, adapter_ids: frozenset[str]) -> None:
        """From now on keep these in the pool, however long nobody uses them; also after restarts.

        They are not loaded by this. They leave all the same where a request could not run else.
        """
        ...

    def prefetch(self, manifest: AdapterManifest) -> None:
        """Hint that the adapter will be wanted soon; nothing tells whether it was followed.

        Raises:
            EngineUnavailable: the engine is not ready.
        """
        ...
