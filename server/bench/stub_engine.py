"""An engine core that computes nothing: one token per live request and step, at a fixed pace.

It runs where the real one does, in the engine process, driven by the same loop. When it emitted
what goes into a file that other processes map, on the clock that all processes of a machine share.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import (
    EndEvent,
    Event,
    FinishReason,
    Request,
    SampledToken,
    TokenEvent,
)
from loraplex_server.engine.messages import EngineInfo, EngineStats, FreedMemory


class EmitLog:
    """When each token left the engine; written by one process, read by any.

    Requests say in their prompt's first token which row is theirs. All times are nanoseconds of
    `time.monotonic_ns`.
    """

    NUM_ROWS = 512
    #: Tokens of a request whose times are kept.
    NUM_COLUMNS = 4096
    _HEADER = 8

    def __init__(self, path: Path) -> None:
        """Open the log, made on first use."""
        num_bytes = 8 * (self._HEADER + self.NUM_ROWS * self.NUM_COLUMNS)
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(num_bytes)
        with path.open("r+b") as file:
            self.cells = memoryview(mmap.mmap(file.fileno(), num_bytes)).cast("q")

    def mark(self, row: int, index: int, now_ns: int) -> None:
        if index < self.NUM_COLUMNS:
            self.cells[self._HEADER + row * self.NUM_COLUMNS + index] = now_ns

    def emitted_ns(self, row: int, index: int) -> int:
        return self.cells[self._HEADER + row * self.NUM_COLUMNS + index]

    def count(self, num_live: int, num_tokens: int, outside_ns: int) -> None:
        """Book a step: who lives, what it emitted, and the time since the step before it ended."""
        cells = self.cells
        cells[0] = num_live
        cells[1] += num_tokens
        cells[2] += 1
        cells[3] += outside_ns

    @property
    def num_live(self) -> int:
        return self.cells[0]

    @property
    def totals(self) -> tuple[int, int, int]:
        """Tokens and steps so far, and the time outside of steps."""
        return self.cells[1], self.cells[2], self.cells[3]


class StubCore:
    """Stands in for `EngineCore`.

    Args:
        pace_s: from one step to the next.
        token_ids: what it answers, round and round.
    """

    is_waiting_for_loads = False

    def __init__(self, log_path: Path, pace_s: float, token_ids: tuple[int, ...]) -> None:
        self.info = EngineInfo(
            max_model_len=8192,
            num_pages=4096,
            page_tokens=16,
            page_bytes=12288,
            num_layers=30,
            dtype="bfloat16",
            device="cpu",
        )
        self.scheduler = self  # as far as `PendingDiscards` needs one
        self._log = EmitLog(log_path)
        self._pace_ns = int(pace_s * 1e9)
        self._token_ids = token_ids
        self._live: dict[str, tuple[Request, list[int]]] = {}
        self._next_ns = 0
        self._ended_ns = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> list[Event]:
        self._live[request.request_id] = request, [0]
        return []

    def abort(self, request_id: str) -> list[Event]:
        if self._live.pop(request_id, None) is None:
            return []
        return [EndEvent(request_id, FinishReason.CANCELLED)]

    def step(self) -> list[Event]:
        started_ns = time.monotonic_ns()
        outside_ns = started_ns - self._ended_ns if self._ended_ns else 0
        self._next_ns = max(self._next_ns + self._pace_ns, started_ns)
        while (left_ns := self._next_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)
        now_ns = time.monotonic_ns()
        events = [self._advance(*entry, now_ns) for entry in list(self._live.values())]
        self._log.count(len(self._live), len(events), outside_ns)
        self._ended_ns = time.monotonic_ns() if self._live else 0
        return events

    def _advance(self, request: Request, num_sent: list[int], now_ns: int) -> Event:
        index, row = num_sent[0], request.prompt_token_ids[0]
        num_sent[0] += 1
        if row < EmitLog.NUM_ROWS:
            self._log.mark(row, index, now_ns)
        is_last = index + 1 == request.sampling.max_tokens
        if is_last:
            del self._live[request.request_id]
        token_id = self._token_ids[(7 * row + index) % len(self._token_ids)]
        reason = FinishReason.LENGTH if is_last else None
        return TokenEvent(request.request_id, SampledToken(token_id), reason)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._live), pages_free=self.info.num_pages)

    def learn_tokens(self, tokenizer: str) -> None:
        """Nothing is constrained here."""

    def prefetch(self, manifest: AdapterManifest) -> None:
        pass

    def keep_adapters(self, adapter_ids: frozenset[str]) -> None:
        pass

    def discard_adapter(self, adapter_id: str) -> FreedMemory:
        return FreedMemory()

    def holds_adapter(self, adapter_id: str) -> bool:
        return False

    def running_adapters(self) -> set[str]:
        return set()

    def waiting_adapters(self) -> set[str]:
        return set()

    def close(self) -> None:
        pass


def build_stub(
    wake: Callable[[], None], *, log_path: Path, pace_s: float, token_ids: tuple[int, ...]
) -> StubCore:
    """A `CoreFactory`, once its keywords are bound."""
    return StubCore(log_path, pace_s, token_ids)
