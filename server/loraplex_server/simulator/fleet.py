"""Replicas behind a router, run in one simulated time.

Replicas share nothing. The router sends each request when it arrives; it knows how many requests
each replica has been sent and has ended by then, and nothing else.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Final, Protocol

import numpy as np

from loraplex_server.simulator.replica import EngineParts, Replica
from loraplex_server.simulator.requests import RequestBook
from loraplex_server.simulator.results import Counters, Outcome, Record
from loraplex_server.simulator.trace import NOBODY

#: With more than one replica, follow-up turns are noticed in steps of so many seconds.
_SLICE_S: Final = 0.05


class Router(Protocol):
    """Decides who serves a request, knowing only what it has sent and what came back."""

    def choose(self, adapter: int, in_flight: list[int]) -> int:
        """Return the replica's index, given each one's number of unanswered requests."""


class RoundRobin:
    """Each in turn, whatever is asked for."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, adapter: int, in_flight: list[int]) -> int:
        chosen = self._next % len(in_flight)
        self._next += 1
        return chosen


class AdapterAffine:
    """The same replica for the same adapter, while it is not overloaded.

    Rendezvous hashing (Thaler and Ravishankar, 1998): an adapter prefers replicas in the order of
    hash(adapter, replica). The first that has fewer than `bound` times the mean number of requests
    takes it (consistent hashing with bounded loads, Mirrokni et al., SODA 2018).
    """

    def __init__(self, num_replicas: int, *, bound: float = 1.25) -> None:
        self._num_replicas = num_replicas
        self._bound = bound
        self._preferences: dict[int, list[int]] = {}

    def choose(self, adapter: int, in_flight: list[int]) -> int:
        most = self._bound * (sum(in_flight) + 1) / len(in_flight)
        preferred = self._preference(adapter)
        return next((i for i in preferred if in_flight[i] + 1 <= max(1.0, most)), preferred[0])

    def _preference(self, adapter: int) -> list[int]:
        preference = self._preferences.get(adapter)
        if preference is None:
            hashes = [
                blake2b(f"{adapter}/{i}".encode(), digest_size=8).digest()
                for i in range(self._num_replicas)
            ]
            preference = sorted(range(self._num_replicas), key=hashes.__getitem__)
            self._preferences[adapter] = preference
        return preference


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
    """Runs a trace through replicas; used once."""

    def __init__(
        self,
        book: RequestBook,
        make_parts: Callable[[], EngineParts],
        num_replicas: int = 1,
        router: Router | None = None,
    ) -> None:
        self._book = book
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

    @property
    def num_ends(self) -> list[int]:
        """How many times each request has ended; 1 for each when all is done."""
        return self._record.num_ends

    def run(self) -> Outcome:
        """Simulate until every request has ended."""
        started = time.perf_counter()
        if len(self.replicas) == 1:
            self._run_alone()
        elif self._book.followers:
            self._run_in_slices()
        else:
            for at_s, index in sorted(self._arrivals):
                self._route(index, at_s)
            self._arrivals = []
        for replica in self.replicas:
            replica.run(float("inf"))
        return self._outcome(time.perf_counter() - started)

    def _run_alone(self) -> None:
        """One replica needs no router and may see its own follow-up turns at once."""
        replica = self.replicas[0]
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

    def _route(self, index: int, at_s: float) -> None:
        for replica in self.replicas:
            replica.run(at_s)
        self._send(index, at_s, at_s)

    def _send(self, index: int, at_s: float, now: float) -> None:
        in_flight = [backlog.at(now) for backlog in self._backlogs]
        chosen = self._router.choose(int(self._book.trace.adapter[index]), in_flight)
        self._backlogs[chosen].num += 1
        self.replicas[chosen].submit(index, at_s)

    def _follow_up(self, index: int, ended_s: float) -> None:
        """A request was answered: its conversation goes on after a pause."""
        following = self._book.followers.get(index)
        if following is None:
            return
        at_s = ended_s + float(self._book.trace.arrival_s[following])
        if len(self.replicas) == 1:
            self.replicas[0].submit(following, at_s)
        else:
            heapq.heappush(self._arrivals, (at_s, following))

    def _outcome(self, wall_s: float) -> Outcome:
        record = self._record
        return Outcome(
            trace=self._book.trace,
            arrival_s=np.array(record.arrival_s),
            first_s=np.array(record.first_s),
            end_s=np.array(record.end_s),
            num_cached=np.array(record.num_cached, np.float64),
            counters=sum((r.counters() for r in self.replicas), Counters()),
            num_rejected=sum(replica.num_rejected for replica in self.replicas),
            wall_s=wall_s,
        )
