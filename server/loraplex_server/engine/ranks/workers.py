"""The other ranks of a replica, as rank 0 holds them: from their spawn to their end.

Rank 0 has the scheduler and is the parent of all others. If one of them ends, fails or hangs, no
step can be computed any more, and rank 0 may at that moment sit in a collective that never returns.
So a thread apart watches, and ends what is left: see `on_lost`. It also spawns the ranks, as they
end with the thread that did (`tether`).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Final, TypeVar

import torch

from loraplex_kernels.collectives import TorchCollectives
from loraplex_server.engine.errors import EngineConfigError, EngineError, RankLost
from loraplex_server.engine.messages import Shutdown
from loraplex_server.engine.ranks.messages import (
    FromWorker,
    JoinGroup,
    Joining,
    Loaded,
    LoaderReport,
    RankFailed,
    Serving,
    Sized,
    ToWorker,
    UseSizes,
)
from loraplex_server.engine.ranks.seat import RANK_TIMEOUT_S, Meeting, least, part
from loraplex_server.engine.ranks.worker import BuildRank, run_rank
from loraplex_server.engine.tether import tethered_process
from loraplex_server.model.errors import ModelError

log = logging.getLogger(__name__)

#: How much longer than rank 0 another may take to load its part: all read the same files, and the
#: disk may be slow.
_LOAD_LAG_S: Final = 600.0

#: How long every later part of a start may take: all ranks come to it at about the same time.
_START_S: Final = RANK_TIMEOUT_S

#: How often the clock is looked at while something is due.
_TICK_S: Final = 0.5

#: How long a rank that failed has others look for what made it fail: one that was killed, say.
_CAUSE_S: Final = 0.3

#: How long whoever fails in a collective waits for the news that a rank is lost.
_NEWS_S: Final = 3.0

#: How long ranks may take to end by themselves before they are killed, and then to be gone.
_STOP_S: Final = 5.0

_M = TypeVar("_M")


class RankWorkers:
    """Implements `Seat` for rank 0. Used from the thread that steps the engine, but for `lose`.

    Whoever creates it must `close` it, from any thread: that ends a `send` that hangs.

    Attributes:
        num_ranks: of the replica, this one included.
        timeout_s: how long a step or a load may take before a rank is taken to hang.
        failure: why the replica cannot go on; empty while it can.
        on_report: called in the watching thread with what a rank's loader reports.
    """

    rank: Final = 0

    def __init__(
        self,
        num_ranks: int,
        build: BuildRank,
        *,
        on_lost: Callable[[], None] = lambda: None,
        timeout_s: float = RANK_TIMEOUT_S,
    ) -> None:
        """Spawn the other ranks.

        Args:
            build: picklable; builds a rank inside its process.
            on_lost: called in the watching thread when a rank is lost and all others were killed,
                with `failure` set. Collectives over gloo then fail; those on a GPU may not.
            timeout_s: how long a step or a load may take before a rank is taken to hang.

        Raises:
            Exception: they could not be spawned; pickling `build` runs code of any kind.
        """
        self.num_ranks = num_ranks
        self.failure = ""
        self.on_report: Callable[[int, LoaderReport], None] = lambda rank, report: None
        self._on_lost = on_lost
        self.timeout_s: Final = timeout_s
        #: By when what must be done, and what to say if it is not.
        self._due: tuple[float, str] | None = None
        #: By when ranks must have ended by themselves.
        self._close_by: float | None = None
        self._has_joined = self._is_serving = False
        self._is_lost, self._is_closing = threading.Event(), threading.Event()
        self._inbox: queue.SimpleQueue[tuple[int, FromWorker] | None] = queue.SimpleQueue()
        self._meeting: Meeting | None = None
        self._ends: dict[int, Connection] = {}
        self._sending = threading.Lock()
        self._processes: dict[int, multiprocessing.process.BaseProcess] = {}
        atexit.register(self._abandon)
        spawned: Future[None] = Future()
        self._watcher = threading.Thread(
            target=self._watch, args=(build, spawned), daemon=True, name="rank-watcher"
        )
        self._watcher.start()
        try:
            spawned.result()
        except BaseException:
            self._is_closing.set()
            wait([spawned])
            self._kill()
            atexit.unregister(self._abandon)
            raise

    def _spawn(self, rank: int, build: BuildRank) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._ends[rank] = ours
        with contextlib.closing(theirs):
            name = f"loraplex-rank-{rank}"
            process = tethered_process(
                run_rank, theirs, build, rank, self.num_ranks, name=name, daemon=True
            )
            process.start()
            self._processes[rank] = process

    # ---- starting --------------------------------------------------------------------------

    def join(self, device: torch.device) -> TorchCollectives:
        """See `Seat`; raises EngineConfigError when a rank could not load its part, or hangs."""
        self._collect(Loaded, "loaded its part of the model", _LOAD_LAG_S)
        self._meeting = Meeting.call()
        self.send(JoinGroup(self._meeting.port))
        self._collect(Joining, "come to meet the others")
        with self.due("the ranks have not met", _START_S):
            group = self._meeting.join(device, rank=0, num_ranks=self.num_ranks, timeout_s=_START_S)
        self._has_joined = True
        return group

    def agree(self, *sizes: int) -> tuple[int, ...]:
        """See `Seat`; raises EngineConfigError when a rank could not tell."""
        told = self._collect(Sized, "told what it has room for")
        agreed = least([sizes, *(said.sizes for said in told)])
        self.send(UseSizes(agreed))
        return agreed

    def begin_serving(self) -> None:
        """Wait until all ranks take up work; raises EngineConfigError when one cannot."""
        self._collect(Serving, "come to take up work")
        self._is_serving = True

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Close if the block fails; if that was for the failure of another rank, say so.

        Raises:
            EngineConfigError: another rank failed; the message names it.
        """
        try:
            yield
        except BaseException as error:
            # Once ranks serve, `due` has told which failures are another's.
            is_own = (
                self._is_serving
                or not isinstance(error, Exception)
                or isinstance(error, (EngineError, ModelError))
            ) and not isinstance(error, RankLost)
            failure = "" if is_own else self._news()
            self.close()
            if failure:
                raise EngineConfigError(failure) from error
            raise

    def _collect(self, kind: type[_M], done: str, limit_s: float | None = None) -> list[_M]:
        """Wait for one message of this kind from every rank.

        Args:
            done: what it says that a rank has done.
            limit_s: how long to wait for the last of them; default: `_START_S`.

        Raises:
            EngineConfigError: a rank failed, or did not answer in time.
        """
        limit_s = limit_s or _START_S
        give_up_at = time.monotonic() + limit_s
        found: dict[int, _M] = {}
        while len(found) < self.num_ranks - 1:
            try:
                arrived = self._inbox.get(timeout=max(0.0, give_up_at - time.monotonic()))
            except queue.Empty:
                late = next(rank for rank in self._processes if rank not in found)
                raise EngineConfigError(
                    f"{self._name(late)} has not {done} {limit_s:g} s after rank 0: it hangs; see "
                    f"what it logged last (its lines say rank {late}), and its disk and device"
                ) from None
            if arrived is None:
                raise EngineConfigError(self.failure)
            rank, message = arrived
            assert isinstance(message, kind), "ranks start in one order"
            found[rank] = message
        return list(found.values())

    # ---- serving ---------------------------------------------------------------------------

    def send(self, message: ToWorker) -> None:
        """Send to every rank; that one is gone shows elsewhere.

        A full pipe blocks, but not for long: a thread of each rank drains it, unless it hangs.
        """
        pickled = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self.due(), self._sending:
            for end in self._ends.values():
                with contextlib.suppress(OSError):
                    end.send_bytes(pickled)

    @contextlib.contextmanager
    def due(
        self, failing: str = "a step was not computed", limit_s: float | None = None
    ) -> Iterator[None]:
        """Have the block done in time, by all ranks: who hangs in it is lost.

        A block within another has as long as that one.

        Args:
            failing: what is the matter if it is not done.
            limit_s: the time; default: `timeout_s`.

        Raises:
            RankLost: the block failed because a rank is lost.
        """
        before, limit_s = self._due, limit_s or self.timeout_s
        self._due = before or (
            time.monotonic() + limit_s,
            f"{failing} in {limit_s:g} s: one of {self.num_ranks} ranks hangs",
        )
        try:
            yield
        except BaseException as error:
            is_of_collective = isinstance(error, RuntimeError) and not isinstance(error, RankLost)
            failure = self._news() if is_of_collective else ""
            if self._is_serving:
                # The others wait in the middle of what was broken off, or in that of a message.
                self._break(f"a step was broken off on rank 0 by {type(error).__name__}")
            if failure:
                raise RankLost(failure) from error
            raise
        finally:
            self._due = before

    def lose(self, reason: str) -> None:
        """A rank ended, failed or hangs: kill all, and tell whoever waits. From any thread."""
        if not self._break(reason):
            return
        self._inbox.put(None)
        if not self._is_serving:
            # Whoever builds the engine can still say why it cannot, if not stuck in a collective.
            self._is_closing.wait(_NEWS_S)
        if not self._is_closing.is_set():
            self._on_lost()

    def _break(self, reason: str) -> bool:
        """Kill all other ranks, unless that was done; return whether it was not."""
        if self._is_closing.is_set() or self._is_lost.is_set():
            return False
        self.failure = reason
        log.critical("%s; this replica ends", reason)
        self._is_lost.set()
        self._kill()
        return True

    def _news(self) -> str:
        """Return why a rank is lost, if that becomes known about now."""
        self._is_lost.wait(_NEWS_S)
        return self.failure

    # ---- ending ----------------------------------------------------------------------------

    def close(self) -> None:
        """Let the ranks finish what they do, for a while; then none is left. Idempotent."""
        self._is_closing.set()
        if self._is_serving and not self._is_lost.is_set():
            give_up_at = self._close_by = time.monotonic() + _STOP_S
            self.send(Shutdown())
            for process in self._processes.values():
                process.join(max(0.0, give_up_at - time.monotonic()))
        self._kill()
        self._watcher.join()
        with self._sending:  # who hung in a full pipe does no longer: it was hung up
            for end in self._ends.values():
                end.close()
        if self._has_joined:
            self._has_joined = False
            if not part(_STOP_S):
                log.warning("NCCL does not give its communicator up; ending the process does")
        self._meeting = None
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """The interpreter exits, and nobody has closed this: multiprocessing would wait."""
        self._is_closing.set()
        self._kill()

    def _kill(self) -> None:
        for process in list(self._processes.values()):
            process.kill()
        for end in list(self._ends.values()):
            _hang_up(end)
        give_up_at = time.monotonic() + _STOP_S  # a driver may keep one that hangs in it
        for process in list(self._processes.values()):
            process.join(max(0.0, give_up_at - time.monotonic()))

    # ---- in the watching thread ------------------------------------------------------------

    def _watch(self, build: BuildRank, spawned: Future[None]) -> None:
        try:
            for rank in range(1, self.num_ranks):
                self._spawn(rank, build)
        except BaseException as error:  # noqa: BLE001  (raised again in the caller)
            spawned.set_exception(error)
            return
        spawned.set_result(None)
        try:
            self._watch_ranks()
        except Exception as error:
            log.exception("the ranks are not watched any more")
            self.lose(f"the ranks are not watched any more: {error}")

    def _watch_ranks(self) -> None:
        ranks = {end: rank for rank, end in self._ends.items()}
        while ranks:
            for end in connection.wait(list(ranks), _TICK_S):
                assert isinstance(end, Connection)
                try:
                    self._take(ranks[end], end.recv())
                except (EOFError, OSError):
                    self.lose(self._obituary(ranks.pop(end)))
            due, close_by, now = self._due, self._close_by, time.monotonic()
            if close_by is not None and now >= close_by:
                self._kill()  # `close` may hang in a full pipe of one that hangs
            elif due is not None and now >= due[0]:
                self.lose(due[1])

    def _take(self, rank: int, message: FromWorker) -> None:
        if isinstance(message, LoaderReport):
            self.on_report(rank, message)
        elif isinstance(message, RankFailed):
            # Ranks fail in their collectives when another one ends: that one is to be named.
            time.sleep(_CAUSE_S)
            killed = [r for r, process in self._processes.items() if (process.exitcode or 0) < 0]
            if killed:
                self.lose(self._obituary(killed[0]))
            else:
                self.lose(f"{self._name(rank)}: {message.message}")
        else:
            self._inbox.put((rank, message))

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.num_ranks}"

    def _obituary(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(_CAUSE_S)
        code = process.exitcode
        if code is None:
            return f"{self._name(rank)} closed its pipe"
        if code >= 0:
            return f"{self._name(rank)} ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (the system's killer, for lack of memory?)" if -code == signal.SIGKILL else ""
        return f"{self._name(rank)} was ended by {name}{hint}"


def _hang_up(end: Connection) -> None:
    """Have whoever waits at a pipe meet its end, though somebody may still hold the other one.

    A process that a driver keeps does, and so does any that a rank has forked.
    """
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(end.fileno())) as pipe:
        pipe.shutdown(socket.SHUT_RDWR)
