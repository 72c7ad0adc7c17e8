"""The API process's end of the engine: submit requests, receive events, survive its death."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import Event, Request
from loraplex_server.engine.messages import EngineInfo, EngineState, EngineStats, FreedMemory


class Submission(Protocol):
    """One or several requests that were handed over together."""

    def cancel(self, request_ids: Sequence[str] | None = None) -> None:
        """Ask the engine to end these requests (default: all); their `cancelled` events follow."""
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

    def submit(self, requests: Sequence[Request], take: Callable[[Event], None]) -> Submission:
        """Hand over requests; raises EngineUnavailable when the engine is not ready.

        Args:
            take: called in the event loop with every event, in their order per request, and never
                before this returns. Each request gets exactly one terminal event, its last, also
                when the engine dies. It must not raise: others' events come after.
        """
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

    def learn_tokens(self, tokenizer: str) -> None:
        """Compile the grammars of requests for this tokenizer, also after restarts.

        Args:
            tokenizer: JSON, as the `tokenizers` library writes it.
        """
        ...

    def prefetch(self, manifest: AdapterManifest) -> None:
        """Hint that the adapter will be wanted soon; nothing tells whether it was followed.

        Raises:
            EngineUnavailable: the engine is not ready.
        """
        ...
