"""How many requests could have had their first token in time, if all were known beforehand.

A *fluid server* is a relaxation of the device: one resource (arithmetic, or memory traffic) at its
peak, one request after the other, no quantum, no wait for a step's end. A request costs it its
least possible work there. It has its first token in time only if the server has done all but
`buffer_s` of the work that it started up to then, where `buffer_s` bounds the work still owed to
running requests. So with accepted requests served in order of arrival,

    completion_i <= arrival_i + slo_s + buffer_s          for every one that is in time.

All due dates lie equally far from their releases, hence release and due dates agree in order, and
the largest set of jobs in time is found by the algorithm of Kise, Ibaraki and Mine (Operations
Research 26(1), 1978; optimality: Li, Chen and Tang, OR Letters 38, 2010), which for equal releases
is Moore and Hodgson's. Each resource gives an upper bound, so the least of them is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraplex_server.simulator.trace import Floats


@dataclass(frozen=True)
class FluidServer:
    """One resource: seconds of it that each request costs, and how much may be owed at once."""

    name: str
    work_s: Floats
    buffer_s: float


def most_in_time(release_s: Floats, due_s: Floats, work_s: Floats) -> int:
    """Return the size of the largest set of jobs that one machine can complete by their due dates.

    Jobs run one at a time without interruption, none before its release. Releases and due dates
    must both be in ascending order. O(n) per job that is left out, O(n^2) in all.
    """
    assert (np.diff(release_s) >= 0).all(), "releases must ascend"
    assert (np.diff(due_s) >= 0).all(), "due dates must ascend with the releases"
    num = len(release_s)
    chosen = np.empty(num, np.int64)
    start, end = np.empty(num), np.empty(num)
    count = 0
    for job in range(num):
        start[count] = max(release_s[job], end[count - 1] if count else 0.0)
        end[count] = start[count] + work_s[job]
        chosen[count] = job
        count += 1
        if end[count - 1] > due_s[job]:
            worst = _most_in_the_way(release_s[chosen[:count]], start[:count], end[:count])
            chosen[worst : count - 1] = chosen[worst + 1 : count]
            count -= 1
            _retime(worst, count, chosen, release_s, work_s, start, end)
    return count


def upper_bound(release_s: Floats, slo_s: float, servers: list[FluidServer]) -> int:
    """Return how many requests at most can have their first token within `slo_s`."""
    return min(
        most_in_time(release_s, release_s + slo_s + server.buffer_s, server.work_s)
        for server in servers
    )


def _most_in_the_way(release_s: Floats, start: Floats, end: Floats) -> int:
    """Return the job whose removal lets the last one end earliest.

    Without job k the next one starts earlier by what k held the machine up, `end[k] - end[k - 1]`,
    each later one by as much or, if less, by what it waited. The last job's own removal leaves
    `end[-2]`.
    """
    held_up = np.diff(end, prepend=0.0)
    waited = np.append(start - release_s, np.inf)
    least_wait_after = np.minimum.accumulate(waited[::-1])[::-1][1:]
    return int(np.argmax(np.minimum(held_up, least_wait_after)))


def _retime(
    first: int,
    count: int,
    chosen: np.ndarray[tuple[int], np.dtype[np.int64]],
    release_s: Floats,
    work_s: Floats,
    start: Floats,
    end: Floats,
) -> None:
    """Set start and end of the chosen jobs from `first` on."""
    at = end[first - 1] if first else 0.0
    for index in range(first, count):
        job = chosen[index]
        start[index] = max(release_s[job], at)
        at = end[index] = start[index] + work_s[job]
