"""Replicas behind a router, run in one simulated time.

Replicas share nothing. The router sends each request when it arrives; it knows how many requests
each replica has been sent and has ended by then, who is alive, and, if it asks for that, what the
replicas' metrics said when they were last read.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from loraplex_server.simulator.replica import EngineParts, Replica
from loraplex_server.simulator.requests import RequestBook
from loraplex_server.simulator.results import Counters, Outcome, Record
from loraplex_server.simulator.routing.router import FleetView, Router
from loraplex_server.simulator.routing.spread import RoundRobin
from loraplex_server.simulator.trace import NOBODY

#: With more than one replica, follow-up turns are noticed in steps of so many seconds.
_SLICE_S: Final = 0.05


@dataclass(frozen=True)
class Death:
    """A replica that is gone from a moment on. What it had not answered is asked again elsewhere.

    Attributes:
        retry_s: how long clients wait before they ask again (the SDK's first pause).
    """

    at_s: float
    replica: int
    retry_s: float = 0.5


class _Backlog:
    """Requests sent to one replica that had not ended at a given time."""

    def __init__(self, ended_s: deque[float]) -> None:
        self._ended_s = ended_s
        self.num = 0

    def at(self, now: float) -> int:
        while self._ended_s and self._ended_s[0] <= now:
            self._ended_s.popleft()
            self.num -= 1
        return self.num


class Fleet:
    """Runs a trace through replicas; used once.

    Attributes:
        book: the requests of the trace.
    """

    def __init__(
        self,
        book: RequestBook,
        make_parts: Callable[[], EngineParts],
        num_replicas: int = 1,
        router: Router | None = None,
        deaths: Sequence[Death] = (),
    ) -> None:
        if deaths and (book.followers or num_replicas <= len(deaths)):
            raise ValueError("a death needs a survivor, and a trace without conversations")
        self.book = book
        self._record = Record(book.trace)
        self._router = router or RoundRobin()
        self._arrivals: list[tuple[float, int]] = [
            (at_s, index)
            for index, at_s in enumerate(book.trace.arrival_s.tolist())
            if book.trace.follows[index] == NOBODY
        ]
        heapq.heapify(self._arrivals)
        self.replicas = [
            Replica(make_parts(), book, self._record, self._follow_up) for _ in range(num_replicas)
        ]
        self._backlogs = [_Backlog(replica.ended_s) for replica in self.replicas]
        self._deaths = deque(sorted(deaths, key=lambda death: death.at_s))
        self._retried: set[int] = set()
        self._view = FleetView([0] * num_replicas, list(range(num_replicas)))
        self._reported_s = float("-inf")

    @property
    def num_ends(self) -> list[int]:
        """How many times each request has ended; 1 for each when all is done."""
        return self._record.num_ends

    def run(self) -> Outcome:
        """Simulate until every request has ended."""
        started = time.perf_counter()
        if len(self.replicas) == 1:
            self._run_alone()
        elif self.book.followers:
            self._run_in_slices()
        else:
            self._run_in_order()
        for i in self._view.alive:
            self.replicas[i].run(float("inf"))
        return self._outcome(time.perf_counter() - started)

    def _run_alone(self) -> None:
        """One replica needs no router and may see its own follow-up turns at once."""
        replica = self.replicas[0]
        self._record.replica = [0] * len(self.book.trace)
        arrivals, self._arrivals = self._arrivals, []
        for at_s, index in arrivals:
            replica.submit(index, at_s)
        replica.run(float("inf"))
        assert not self._arrivals

    def _run_in_slices(self) -> None:
        now = 0.0
        while self._arrivals or not all(replica.is_idle for replica in self.replicas):
            now += _SLICE_S
            for replica in self.replicas:
                replica.run(now)
            while self._arrivals and self._arrivals[0][0] <= now:
                at_s, index = heapq.heappop(self._arrivals)
                self._send(index, at_s, now)

    def _run_in_order(self) -> None:
        while self._arrivals:
            at_s = self._arrivals[0][0]
            if self._deaths and self._deaths[0].at_s <= at_s:
                self._bury(self._deaths.popleft())
                continue
            _, index = heapq.heappop(self._arrivals)
            self._run_until(at_s)
            self._send(index, at_s, at_s)

    def _run_until(self, now: float) -> None:
        for i in self._view.alive:
            self.replicas[i].run(now)

    def _bury(self, death: Death) -> None:
        """Take a replica out; its unanswered requests arrive again, and wait since they did."""
        self._run_until(death.at_s)
        self._view.alive.remove(death.replica)
        record = self._record
        lost = [
            index
            for index, replica in enumerate(record.replica)
            if replica == death.replica and not record.num_ends[index]
        ]
        self._retried.update(lost)
        for index in lost:
            heapq.heappush(self._arrivals, (death.at_s + death.retry_s, index))

    def _send(self, index: int, at_s: float, now: float) -> None:
        view, record = self._view, self._record
        view.in_flight = [backlog.at(now) for backlog in self._backlogs]
        self._read_reports(now)
        chosen = self._router.choose(int(self.book.trace.adapter[index]), view)
        self._backlogs[chosen].num += 1
        record.replica[index] = chosen
        since_s = record.arrival_s[index] if index in self._retried else at_s
        self.replicas[chosen].submit(index, at_s, since_s=since_s)

    def _read_reports(self, now: float) -> None:
        every_s = self._router.report_every_s
        if every_s is not None and now >= self._reported_s + every_s:
            self._reported_s = now
            self._view.reports = [replica.report() for replica in self.replicas]

    def _follow_up(self, index: int, ended_s: float) -> None:
        """A request was answered: its conversation goes on after a pause."""
        following = self.book.followers.get(index)
        if following is None:
            return
        at_s = ended_s + float(self.book.trace.arrival_s[following])
        if len(self.replicas) == 1:
            self.replicas[0].submit(following, at_s)
        else:
            heapq.heappush(self._arrivals, (at_s, following))

    def _outcome(self, wall_s: float) -> Outcome:
        record = self._record
        return Outcome(
            trace=self.book.trace,
            arrival_s=np.array(record.arrival_s),
            first_s=np.array(record.first_s),
            end_s=np.array(record.end_s),
            num_cached=np.array(record.num_cached, np.float64),
            counters=sum((r.counters() for r in self.replicas), Counters()),
            num_rejected=sum(replica.num_rejected for replica in self.replicas),
            wall_s=wall_s,
            found=np.array(record.found, np.int64),
            replica=np.array(record.replica, np.int64),
        )
