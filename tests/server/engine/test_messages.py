from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from loraplex_scheduler.plan import (
    EndEvent,
    FinishReason,
    SampledToken,
    TokenEvent,
    TokenLogprobs,
)
from loraplex_server.engine.messages import EngineStats, StepOutput

REASONS = st.sampled_from(FinishReason)
LOGPROBS = st.builds(TokenLogprobs, st.just(-0.5), st.just(((7, -0.5), (8, -1.0))))
TOKENS = st.builds(SampledToken, st.integers(0, 9), st.none() | LOGPROBS)
NUM_CACHED = st.integers(0, 2)


@st.composite
def steps(draw):
    """Events of a step: of some requests tokens, then perhaps an end without one; interleaved."""
    per_request = []
    for request_id in draw(st.sets(st.sampled_from("abcdef"))):
        tokens = draw(st.lists(st.tuples(TOKENS, st.none() | REASONS, NUM_CACHED), max_size=3))
        events = [TokenEvent(request_id, *fields) for fields in tokens]
        if draw(st.booleans()):
            events.append(EndEvent(request_id, draw(REASONS), "why", 1.5))
        per_request.append(events)
    order = draw(st.permutations([i for i, e in enumerate(per_request) for _ in e]))
    remaining = [iter(events) for events in per_request]
    return [next(remaining[i]) for i in order]


@given(steps())
def test_events_of_a_step_arrive_as_they_were_in_order_per_request(events):
    stats = EngineStats(num_running=3)
    arrived = pickle.loads(pickle.dumps(StepOutput.of(events, stats)))
    assert arrived.stats == stats
    for request_id in "abcdef":
        own = [event for event in events if event.request_id == request_id]
        assert [event for event in arrived.events if event.request_id == request_id] == own


def test_a_plain_token_travels_in_columns_alone():
    output = StepOutput.of([TokenEvent("a", SampledToken(5)), TokenEvent("b", SampledToken(6))])
    assert (output.request_ids, output.token_ids) == (("a", "b"), (5, 6))
    assert (output.details, output.ends) == ({}, ())
