from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from loraplex_server.simulator.oracle import FluidServer, most_in_time, upper_bound


def brute_force(release, due, work):
    for size in range(len(release), 0, -1):
        for chosen in combinations(range(len(release)), size):
            now = 0.0
            for job in chosen:  # by due date, which is the best order
                now = max(now, release[job]) + work[job]
                if now > due[job]:
                    break
            else:
                return size
    return 0


@pytest.mark.parametrize("seed", range(60))
def test_the_greedy_choice_is_as_large_as_any(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 10))
    release = np.sort(rng.integers(0, 12, num)).astype(float)
    due = release + 5 if seed % 2 else np.sort(release + rng.integers(1, 9, num))
    due = np.maximum.accumulate(due)
    work = rng.integers(1, 7, num).astype(float)
    assert most_in_time(release, due, work) == brute_force(release, due, work)


def test_with_one_release_it_is_moore_and_hodgson():
    release = np.zeros(4)
    assert (
        most_in_time(release, np.array([4.0, 5.0, 6.0, 6.0]), np.array([4.0, 3.0, 2.0, 1.0])) == 3
    )


def test_due_dates_must_agree_with_the_releases():
    with pytest.raises(AssertionError, match="due dates"):
        most_in_time(np.array([0.0, 1.0]), np.array([5.0, 4.0]), np.ones(2))


def test_the_bound_is_that_of_the_scarcer_resource():
    release = np.zeros(10)
    servers = [
        FluidServer("compute", np.full(10, 1.0), buffer_s=0.0),
        FluidServer("traffic", np.full(10, 2.0), buffer_s=1.0),
    ]
    assert upper_bound(release, 7.0, servers) == 4
