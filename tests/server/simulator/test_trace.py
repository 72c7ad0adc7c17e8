from __future__ import annotations

import numpy as np
import pytest

from loraplex_server.simulator.trace import NOBODY, Trace


def make_trace(**changes):
    arrays = {
        "arrival_s": np.array([0.0, 1.0]),
        "adapter": np.array([0, 1]),
        "prompt_len": np.array([3, 4]),
        "output_len": np.array([5, 6]),
    }
    return Trace(name="t", num_adapters=2, rate=1.0, duration_s=2.0, **(arrays | changes))


def test_requests_have_one_tenant_and_no_history_by_default():
    trace = make_trace()
    assert trace.tenant.tolist() == [0, 0]
    assert trace.follows.tolist() == [NOBODY, NOBODY]
    assert trace.num_tenants == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": np.array([0])},
        {"adapter": np.array([0, 2])},
        {"prompt_len": np.array([0, 4])},
        {"output_len": np.array([5, 0])},
        {"arrival_s": np.array([1.0, 0.0])},
        {"follows": np.array([NOBODY, 1])},
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError):
        make_trace(**changes)


def test_a_later_turn_may_name_a_pause_shorter_than_the_arrivals_before():
    trace = make_trace(arrival_s=np.array([5.0, 1.0]), follows=np.array([NOBODY, 0]))
    assert len(trace) == 2
