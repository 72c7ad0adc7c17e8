"""A rank other than 0: a process that computes its part of every step, and holds its part of
every adapter.

The main thread takes up work in the order in which it was sent; a second thread receives it, so
that the pipe is always drained. The process ends with the pipe, whatever it is doing then: in a
collective it would wait for a rank that is gone. Stopped or stuck, it ends with rank 0's process.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, NoReturn, Protocol

import torch

from loraplex_kernels.collectives import TorchCollectives
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.collector import CycleCollector
from loraplex_scheduler.plan import AdapterLoad
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.loader import AdapterLoader
from loraplex_server.engine.messages import DiscardAdapter, PrefetchAdapter, Shutdown
from loraplex_server.engine.ranks.messages import (
    FromWorker,
    JoinGroup,
    Joining,
    Loaded,
    LoaderReport,
    LoadPart,
    RankFailed,
    RunStep,
    Serving,
    Sized,
    ToWorker,
    UseSizes,
    Work,
)
from loraplex_server.engine.ranks.plan_news import PlanHearer
from loraplex_server.engine.ranks.seat import Meeting, Seat
from loraplex_server.engine.runner import StepRunner
from loraplex_server.model.errors import ModelError

log = logging.getLogger(__name__)

#: What ends a service politely, sent to its whole process group; rank 0 decides.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: How long to sleep at most when there is nothing to do, for the sake of the collector.
_IDLE_S: Final = 30.0


@dataclass(frozen=True)
class RankParts:
    """What a rank works with: its part of the model over its pool."""

    layout: PoolLayout
    runner: StepRunner
    loader: AdapterLoader


class BuildRank(Protocol):
    """Builds a rank inside its process; `on_loaded` is for the loader's thread."""

    def __call__(self, seat: Seat, on_loaded: Callable[[], None]) -> RankParts: ...


def run_rank(pipe: Connection, build: BuildRank, rank: int, num_ranks: int) -> None:
    """Run one rank until `Shutdown`, or until the pipe closes, in a `tethered_process`."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    seat = WorkerSeat(pipe, rank, num_ranks)
    reporter = _LoadReporter(seat)
    try:
        parts = build(seat, reporter.report)
        reporter.loader = parts.loader
        _serve(seat, parts, reporter)
        parts.runner.close()  # others still need this rank for what it has only launched
    except (EngineError, ModelError) as error:
        seat.send(RankFailed(str(error)))
        _end(1)
    except Exception as error:
        seat.send(RankFailed(f"{type(error).__name__}: {error}"))
        log.exception("rank %d of %d failed", rank, num_ranks)
        _end(1)
    _end(0)


def _end(exit_code: int) -> NoReturn:
    """End at once: nothing is left to save, and torch takes a second or more to take itself down.

    Nor can anything be waited for: others may have ended already, or a load may hang.
    """
    logging.shutdown()
    os._exit(exit_code)


class WorkerSeat:
    """Implements `Seat` over the pipe to rank 0; `send` may be used from any thread."""

    def __init__(self, pipe: Connection, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._pipe = pipe
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True, name="rank-receiver").start()

    def join(self, device: torch.device) -> TorchCollectives:
        """See `Seat`."""
        self.send(Loaded())
        message = self._inbox.get()
        assert isinstance(message, JoinGroup)
        self.send(Joining())
        return Meeting.find(message.port).join(device, rank=self.rank, num_ranks=self.num_ranks)

    def agree(self, *sizes: int) -> tuple[int, ...]:
        """See `Seat`."""
        self.send(Sized(sizes))
        message = self._inbox.get()
        assert isinstance(message, UseSizes)
        return message.sizes

    def take_work(self, timeout_s: float) -> Work | None:
        """Return the next message, once there is one; None if it does not come in time."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        assert not isinstance(message, (JoinGroup, UseSizes)), "these are for a start"
        return message

    def send(self, message: FromWorker) -> None:
        with self._sending:
            try:
                self._pipe.send(message)
            except OSError:
                os._exit(0)  # as below

    def _receive(self) -> None:
        try:
            while True:
                self._inbox.put(self._pipe.recv())
        except (EOFError, OSError):
            # Rank 0 is gone. Nothing here needs saving, while a collective would wait for it.
            os._exit(0)


class _LoadReporter:
    """Tells rank 0 what the loader has done; called in the loader's thread and the main one."""

    def __init__(self, seat: WorkerSeat) -> None:
        self._seat = seat
        self._lock = threading.Lock()
        self._discarding: set[str] = set()
        self.loader: AdapterLoader | None = None

    def discard(self, adapter_id: str) -> None:
        with self._lock:
            assert self.loader is not None, "there is work only for who can do it"
            self._discarding.add(adapter_id)
            self.loader.discard(adapter_id)
        self.report()

    def report(self) -> None:
        with self._lock:
            assert self.loader is not None, "there is work only for who can do it"
            loader = self.loader
            gone = tuple(i for i in self._discarding if not loader.holds(i))
            self._discarding -= set(gone)
            self._seat.send(LoaderReport(tuple(loader.poll()), gone, loader.host_bytes))


def _serve(seat: WorkerSeat, parts: RankParts, reporter: _LoadReporter) -> None:
    hearer = PlanHearer(parts.layout)
    collector = CycleCollector(time.monotonic())
    seat.send(Serving())
    while not isinstance(work := seat.take_work(_IDLE_S), Shutdown):
        if isinstance(work, RunStep):
            parts.runner.launch(hearer.hear(work))
        elif isinstance(work, LoadPart):
            layout = AdapterLayout(parts.layout, work.adapter.spec)
            parts.loader.submit(AdapterLoad(work.adapter, layout, work.pages))
        elif isinstance(work, PrefetchAdapter):
            parts.loader.prefetch(work.manifest)
        elif isinstance(work, DiscardAdapter):
            reporter.discard(work.adapter_id)
        collector.collect_if_due(time.monotonic(), is_idle=work is None)
