"""Who waits for an adapter's memory to be freed: the two ends of `DiscardAdapter`."""

from __future__ import annotations

import asyncio
from typing import Final

from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import AdapterDiscarded, FreedMemory

#: Answers that nobody asked for yet, remembered at most.
_MAX_ANSWERS: Final = 4096


class PendingDiscards:
    """In the engine process: adapters whose last pages are not free yet."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._pending: dict[str, FreedMemory] = {}

    def begin(self, adapter_id: str) -> None:
        """Free what can be freed now."""
        earlier = self._pending.get(adapter_id)
        freed = self._core.discard_adapter(adapter_id)
        self._pending[adapter_id] = earlier or freed

    def take_done(self) -> list[AdapterDiscarded]:
        """Return those of which nothing is left, and those that were asked for again."""
        if not self._pending:
            return []
        scheduler = self._core.scheduler
        wanted = scheduler.running_adapters() | scheduler.waiting_adapters()
        done: list[AdapterDiscarded] = []
        for adapter_id in list(self._pending):
            if adapter_id in wanted:
                self._pending[adapter_id] = FreedMemory()
            elif self._core.holds_adapter(adapter_id):
                # Again: the first time, the last token of some request may have been on its way.
                self._core.discard_adapter(adapter_id)
                if self._core.holds_adapter(adapter_id):
                    continue
            done.append(AdapterDiscarded(adapter_id, self._pending.pop(adapter_id)))
        return done


class DiscardAnswers:
    """In the API process: what was freed, by adapter id. Used from the event loop only."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Future[FreedMemory]] = {}

    def expect(self, adapter_id: str) -> None:
        """A discard was sent."""
        waiting = self._answers.get(adapter_id)
        if waiting is None or waiting.done():
            self._answers[adapter_id] = asyncio.get_running_loop().create_future()
        if len(self._answers) > _MAX_ANSWERS:
            self._answers.pop(next(iter(self._answers))).cancel()

    def take(self, answer: AdapterDiscarded) -> None:
        waiting = self._answers.get(answer.adapter_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer.freed)

    def end_all(self) -> None:
        """The process ended, and its memory with it."""
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_result(FreedMemory())

    async def freed(self, adapter_id: str) -> FreedMemory:
        """See `EngineHandle.freed`; each answer is given once."""
        waiting = self._answers.get(adapter_id)
        if waiting is None:
            return FreedMemory()
        freed = await asyncio.shield(waiting)
        self._answers.pop(adapter_id, None)
        return freed
