"""Fair shares among clients: the Virtual Token Counter.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithms 2 and 4. A
client's counter grows by what it is served, divided by its weight, and the waiting client with the
least counter is next. Among clients that always have something waiting, weighted service then
differs by at most `2 * max(w_p * L_in, w_q * M)`, with L_in the longest prompt and M the tokens of
a full running batch (theorem 4.4 there).

As in the paper a client is *active* while it has requests in the queue; one whose requests all run
asks for nothing that it could be denied. Who becomes active is lifted to the least counter of the
active, or to that of the client that left the queue last: time spent idle banks no credit.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from typing import Final

from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.waiting import Ahead, Key, arrival_key

#: Idle clients remembered before those are forgotten whose counter says nothing any more.
_MAX_IDLE: Final = 4096

#: Dead entries that are not worth a sweep.
_MIN_GARBAGE: Final = 64

#: What an answer is taken to cost until the first ones are known.
_PRIOR_ANSWER_LEN: Final = 128.0


class _Client:
    """Somebody who is served. `share` is one over its weight; `credit` what it paid too much."""

    __slots__ = ("counter", "credit", "num_waiting", "share")

    def __init__(self, counter: float, share: float) -> None:
        self.counter = counter
        self.credit = 0.0
        self.share = share
        self.num_waiting = 0

    def lift(self, level: float) -> None:
        """Let its counter, less its credit, not be under `level`."""
        self.credit = min(self.credit, max(0.0, self.counter - level) / self.share)
        self.counter = max(self.counter, level)

    def charge(self, cost: float) -> None:
        """Let it pay, from its credit first: a counter never falls."""
        from_credit = min(self.credit, cost)
        self.credit -= from_credit
        self.counter += (cost - from_credit) * self.share


class _Line:
    """The waiting sequences of one client and one priority, oldest first; at least one.

    `entry` is its place in a heap of lines, None when it is in none. Counters only grow, so the
    entry may come too early, and is then put where it belongs; it never comes too late.
    """

    __slots__ = ("client", "entry", "priority", "sequences")

    def __init__(self, client: _Client, priority: int) -> None:
        self.client = client
        self.priority = priority
        self.sequences: list[Sequence] = []
        self.entry: _Entry | None = None


_Entry = tuple[float, Key, int, _Line]


class FairQueue:
    """A waiting queue that serves the client with the least counter, see the module.

    Priorities go before fairness, and within a client the oldest goes first. Clients share one
    counter over all priorities. Prompt tokens found in the prefix cache cost nothing, as they are
    not charged. A prompt is charged once: that a preempted sequence is computed again is the
    server's doing, and the client does not pay for it.

    An answer is charged ahead, at admission, as long as answers usually become (the paper's variant
    with length prediction); what it gets beyond that is charged as it comes, and what it leaves is
    credited. Charged as it comes from the start, a client whose counter is the least would be given
    every free place of a step, and of the next ones.
    """

    def __init__(
        self,
        client_of: Callable[[Sequence], str],
        weights: Mapping[str, float] | None = None,
        *,
        prompt_weight: float = 1.0,
        output_weight: float = 2.0,
    ) -> None:
        """
        Args:
            client_of: whom a sequence is charged to.
            weights: shares of clients relative to each other; 1 for those not named.
            prompt_weight, output_weight: cost of a token that is computed, and of one generated.
        """
        self._client_of = client_of
        self._weights = dict(weights or {})
        self._prompt_weight = prompt_weight
        self._output_weight = output_weight
        self._clients: dict[str, _Client] = {}
        self._lines: dict[tuple[int, str], _Line] = {}
        self._heaps: dict[int, list[_Entry]] = {}
        self._num_entered = 0  # entries made since the dead ones were swept out
        self._walked: dict[_Line, None] = {}  # lines that the last walk moved on in
        self._waiting: dict[Sequence, None] = {}
        self._paid: dict[Sequence, int] = {}  # tokens of the answers of those admitted
        self._left_last: _Client | None = None
        self._serials = count()
        self._num_prompts = 1.0
        self._num_outputs = _PRIOR_ANSWER_LEN

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._waiting

    @property
    def num_clients(self) -> int:
        """Clients remembered, active and idle."""
        return len(self._clients)

    @property
    def num_active(self) -> int:
        """Clients that have something waiting."""
        return len({name for _, name in self._lines})

    @property
    def spread(self) -> float:
        """How far apart the counters of active clients are, which theorem 4.4 bounds; 0 of one."""
        counters = [line.client.counter for line in self._lines.values()]
        return max(counters) - min(counters) if counters else 0.0

    def counter(self, client: str) -> float:
        """Return a client's counter; the more of two has been served more for its weight."""
        known = self._clients.get(client)
        return known.counter if known else self._level()

    def push(self, sequence: Sequence) -> None:
        """A sequence arrives, or comes back because it was preempted."""
        name = self._client_of(sequence)
        client = self._clients.get(name) or self._meet(name)
        self._put_back()
        if not client.num_waiting:
            client.lift(self._level())
        client.num_waiting += 1
        self._waiting[sequence] = None
        priority = sequence.request.priority
        line = self._lines.get((priority, name))
        if line is None:
            line = self._lines[priority, name] = _Line(client, priority)
        insort(line.sequences, sequence, key=arrival_key)
        if line.sequences[0] is sequence:
            self._enter(line, 0)

    def remove(self, sequence: Sequence) -> None:
        """It was admitted or ended."""
        del self._waiting[sequence]
        name, priority = self._client_of(sequence), sequence.request.priority
        line = self._lines[priority, name]
        del line.sequences[bisect_left(line.sequences, sequence.service_key, key=arrival_key)]
        if not line.sequences:
            line.entry = None
            del self._lines[priority, name]
        line.client.num_waiting -= 1
        if not line.client.num_waiting:
            self._left_last = line.client

    def in_order(self) -> Iterator[Sequence]:
        """Yield each waiting sequence once, see `WaitingQueue`."""
        self._put_back()
        for priority in sorted(self._heaps):
            yield from self._walk(self._heaps[priority])
            if all(line.priority != priority for line in self._walked):
                del self._heaps[priority]

    def ahead_of(self, newcomer: Sequence, limit: int) -> Ahead:
        """Foresee who is served before it, if nobody else comes and answers have a usual length.

        Until its turn comes, its client is served what it has in line before it; every other client
        is served until its counter is as high.
        """
        name, priority = self._client_of(newcomer), newcomer.request.priority
        level = self._level()
        client = self._clients.get(name) or _Client(level, self._share(name))
        line = self._lines.get((priority, name))
        num_own = bisect_left(line.sequences, newcomer.service_key, key=arrival_key) if line else 0
        start = client.counter if client.num_waiting else max(client.counter, level)
        reach = start + num_own * self._usual_cost(newcomer) * client.share
        ahead: list[Sequence] = line.sequences[:num_own] if line else []
        num_more = 0
        for (other_priority, _), other in self._lines.items():
            num = len(other.sequences)
            if other_priority > priority or other is line:
                continue
            if other_priority == priority:
                num = min(num, self._num_before(other, reach))
            room = max(0, limit - len(ahead))
            ahead += other.sequences[: min(num, room)]
            num_more += max(0, num - room)
        return Ahead(ahead[:limit], num_more + max(0, len(ahead) - limit))

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge tokens to compute, and the answer to come, unless it was admitted before."""
        if sequence in self._paid:
            return
        answer_len = int(self._usual_len(sequence))
        self._paid[sequence] = sequence.num_generated + answer_len
        cost = num_tokens * self._prompt_weight + answer_len * self._output_weight
        self._client(sequence).charge(cost)
        self._num_prompts = 0.99 * self._num_prompts + 1.0
        self._num_outputs *= 0.99

    def charge_outputs(self, sequences: Collection[Sequence]) -> None:
        """Charge one token to each that has got more than it paid for."""
        paid = self._paid
        owing = [s for s in sequences if s.num_tokens - s.num_prompt > paid.get(s, 0)]
        for name, num in Counter(map(self._client_of, owing)).items():
            client = self._clients.get(name) or self._meet(name)
            client.charge(num * self._output_weight)
        self._num_outputs += len(sequences)

    def settle(self, sequence: Sequence) -> None:
        """Credit what an ended sequence paid for and did not get."""
        left = self._paid.pop(sequence, 0) - len(sequence.token_ids) + sequence.num_prompt
        if left > 0:
            self._client(sequence).credit += left * self._output_weight

    # ---- clients ---------------------------------------------------------------------------

    def _client(self, sequence: Sequence) -> _Client:
        name = self._client_of(sequence)
        return self._clients.get(name) or self._meet(name)

    def _meet(self, name: str) -> _Client:
        if len(self._clients) >= 2 * _MAX_IDLE + len(self._waiting):
            self._forget_idle()
        client = self._clients[name] = _Client(self._level(), self._share(name))
        return client

    def _share(self, name: str) -> float:
        return 1.0 / self._weights.get(name, 1.0)

    def _forget_idle(self) -> None:
        """Forget idle clients from the least counter up: those below the level are lifted to it
        anyway when they come back; the few above it lose a debt.
        """
        idle = [(c.counter, name) for name, c in self._clients.items() if not c.num_waiting]
        for _, name in heapq.nsmallest(len(idle) - _MAX_IDLE, idle):
            del self._clients[name]

    def _level(self) -> float:
        """Return the counter below which nobody becomes active."""
        self._put_back()
        tops = [first[0] for heap in self._heaps.values() if (first := self._first(heap))]
        if tops:
            return min(tops)
        return self._left_last.counter if self._left_last else 0.0

    def _usual_len(self, sequence: Sequence) -> float:
        """Return the tokens that its answer is expected to have."""
        usual = self._num_outputs / self._num_prompts
        return min(usual, sequence.last_len - sequence.num_tokens)

    def _usual_cost(self, sequence: Sequence) -> float:
        answer_len = self._usual_len(sequence)
        return sequence.num_prompt * self._prompt_weight + answer_len * self._output_weight

    def _num_before(self, line: _Line, reach: float) -> int:
        """Return how many of a line are served before its client's counter is above `reach`."""
        if line.client.counter > reach:
            return 0
        cost = self._usual_cost(line.sequences[0]) * line.client.share
        return 1 + int((reach - line.client.counter) / max(cost, 1e-9))

    # ---- lines by counter ------------------------------------------------------------------

    def _walk(self, heap: list[_Entry]) -> Iterator[Sequence]:
        places: dict[_Line, int] = {}  # how many of a line were yielded and still wait
        while (first := self._first(heap, places)) is not None:
            line = first[3]
            place = places.get(line, 0)
            sequence = line.sequences[place]
            heapq.heappop(heap)
            line.entry = None
            self._walked[line] = None
            yield sequence
            if place < len(line.sequences) and line.sequences[place] is sequence:
                places[line] = place = place + 1
            if place < len(line.sequences):
                self._enter(line, place)

    def _first(
        self, heap: list[_Entry], places: Mapping[_Line, int] | None = None
    ) -> _Entry | None:
        """Return the least entry, once those before it are where they belong."""
        while heap:
            entry = heap[0]
            line = entry[3]
            if line.entry is entry and entry[0] == line.client.counter:
                return entry
            heapq.heappop(heap)
            if line.entry is entry:
                self._enter(line, places.get(line, 0) if places else 0)
        return None

    def _enter(self, line: _Line, place: int) -> None:
        """Put a line where its counter says; among equals, first whose next sequence is older."""
        key = line.sequences[place].service_key
        # A serial number, as an earlier entry of the same line may lie in the heap.
        line.entry = (line.client.counter, key, next(self._serials), line)
        heapq.heappush(self._heaps.setdefault(line.priority, []), line.entry)
        self._num_entered += 1

    def _put_back(self) -> None:
        """Let the lines that the last walk moved on in start with their oldest again."""
        for line in self._walked:
            if line.sequences:
                self._enter(line, 0)
        self._walked.clear()
        if self._num_entered > 4 * len(self._lines) + _MIN_GARBAGE:
            self._sweep()

    def _sweep(self) -> None:
        """Drop entries of lines that nobody waits in any more; no walk is under way."""
        for priority, heap in list(self._heaps.items()):
            heap[:] = [entry for entry in heap if entry[3].entry is entry]
            heapq.heapify(heap)
            if not heap:
                del self._heaps[priority]
        self._num_entered = 0
