"""The engine core on a tiny random model: events, loads, failures, and what it counts."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from pathlib import Path

import pytest

from loraplex_memory.adapter_file import read_adapter_file, write_adapter_file
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_scheduler.plan import EndEvent, FinishReason, Request, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from tests.support.engine import GatedPool, drive, greedy_request, make_core, save_adapter
from tests.support.tiny_models import tiny_transformer

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture
def make_adapter(model, tmp_path):
    """Return a function that writes a random adapter and gives its manifest."""

    def make(name="a", rank=4, seed=1):
        return save_adapter(tmp_path, model.spec.geometry, name=name, rank=rank, seed=seed)

    return make


@pytest.fixture
def core(model):
    core = make_core(model, num_pages=64, max_model_len=64)
    yield core
    core.close()


def events_of(core, *requests, steps=200):
    events = [e for r in requests for e in core.add(r)]
    for _ in range(steps):
        if not core.has_work:
            return events
        events += core.step(load_timeout_s=5.0)
        core.check()
    raise AssertionError("no end")


def test_an_adapter_changes_the_answer_and_leaves_the_base_alone(core, make_adapter):
    adapter = make_adapter()
    alone = drive(core, [greedy_request("base", PROMPT, ignore_eos=True)])
    both = drive(
        core,
        [
            greedy_request("base", PROMPT, ignore_eos=True),
            greedy_request("tuned", PROMPT, adapter, ignore_eos=True),
        ],
    )
    assert both["base"] == alone["base"]
    assert both["tuned"] != both["base"]


def test_a_vanished_file_fails_its_requests_and_nobody_else(core, make_adapter):
    gone = dataclasses.replace(make_adapter(), adapter_id="gone", path="/nowhere/a.safetensors")
    events = events_of(core, greedy_request("broken", PROMPT, gone), greedy_request("fine", PROMPT))
    (failure,) = [e for e in events if e.request_id == "broken"]
    assert isinstance(failure, EndEvent)
    assert failure.finish_reason is FinishReason.FAILED
    assert "could not be loaded" in failure.message
    (end,) = [e for e in events if e.request_id == "fine" and e.finish_reason]
    assert end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert core.stats().num_load_failures == 1
    assert core.stats().pages_kv == 0


def test_a_file_of_other_shapes_fails_the_load_not_the_engine(core, make_adapter):
    small, large = make_adapter("small", rank=2), make_adapter("large", rank=4)
    lying = dataclasses.replace(large, adapter_id="lying", path=small.path)
    events = events_of(core, greedy_request("r", PROMPT, lying))
    assert events[-1].finish_reason is FinishReason.FAILED
    assert core.stats().pages_adapters == 0


def test_an_adapter_that_overflows_fails_its_request_and_nobody_else(core, make_adapter):
    adapter = make_adapter("loud")
    weights = {
        key: dataclasses.replace(pair, a=pair.a * 1e18, b=pair.b * 1e18)
        for key, pair in read_adapter_file(Path(adapter.path)).lora.items()
    }
    write_adapter_file(Path(adapter.path), AdapterWeights(weights))
    events = events_of(
        core, greedy_request("loud", PROMPT, adapter), greedy_request("fine", PROMPT)
    )
    (failure,) = [e for e in events if e.request_id == "loud"]
    assert failure.finish_reason is FinishReason.FAILED
    assert "not finite" in failure.message
    assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert core.stats().pages_kv == 0


def test_a_request_that_never_fits_is_refused_with_one_event(core):
    (event,) = core.add(greedy_request("r", [5] * 70))
    assert event.finish_reason is FinishReason.REFUSED
    assert not core.has_work


def test_a_late_request_times_out(model, make_adapter, tmp_path):
    gate = tmp_path / "gate"
    core = make_core(model, num_pages=64, make_pool=functools.partial(GatedPool, gate))
    request = greedy_request("r", PROMPT, make_adapter(), max_tokens=2)
    now = time.monotonic()
    request = dataclasses.replace(request, arrival_s=now, deadline_s=now + 1.0)
    assert core.add(request) == []
    events = []
    while core.scheduler.num_waiting:
        events += core.step(load_timeout_s=0.01)
    assert [e.finish_reason for e in events] == [FinishReason.TIMED_OUT]
    gate.touch()
    core.close()


def test_a_deadline_that_has_passed_is_rejected_on_arrival(core):
    request = Request("r", tuple(PROMPT), SamplingParams(max_tokens=50), deadline_s=0.0)
    (event,) = core.add(request)
    assert event.finish_reason is FinishReason.REJECTED
    assert event.retry_after_s > 0
    assert not core.has_work


def test_a_cancelled_request_ends_once_and_frees_its_pages(core):
    core.add(greedy_request("r", PROMPT, ignore_eos=True))
    core.step()
    (event,) = core.abort("r")
    assert event.finish_reason is FinishReason.CANCELLED
    assert core.abort("r") == []
    assert core.stats().pages_kv == 0


def test_sampled_tokens_do_not_depend_on_company(core, make_adapter):
    def request(request_id, seed, adapter=None):
        sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        return Request(request_id, tuple(PROMPT), sampling, adapter)

    def tokens(events, request_id):
        return [e.token.token_id for e in events if e.request_id == request_id]

    adapter = make_adapter()
    alone = tokens(events_of(core, request("me", 3)), "me")
    others = [request(f"o{i}", i, adapter if i % 2 else None) for i in range(10)]
    assert tokens(events_of(core, *others, request("me", 3)), "me") == alone
    assert tokens(events_of(core, request("me", 4)), "me") != alone


def test_counters_add_up(core, make_adapter):
    events = events_of(core, greedy_request("r", PROMPT, make_adapter(), max_tokens=5))
    stats = core.stats()
    assert stats.generated_tokens == len([e for e in events if isinstance(e, TokenEvent)])
    assert stats.prompt_tokens == len(PROMPT)
    assert stats.num_loads == 1
    assert list(stats.resident) == ["a"]
    assert stats.pages_free + stats.pages_adapters == 64


def test_a_load_that_nobody_waits_for_any_more_is_booked(model, make_adapter, tmp_path):
    gate = tmp_path / "gate"
    core = make_core(model, num_pages=64, make_pool=functools.partial(GatedPool, gate))
    core.add(greedy_request("r", PROMPT, make_adapter()))
    core.step()
    core.abort("r")
    assert core.stats().loading == ("a",)
    gate.touch()
    assert core.has_work
    assert events_of(core) == []
    assert list(core.stats().resident) == ["a"]
    assert core.stats().loading == ()
    core.close()


def test_steps_leave_no_cycles_to_the_collector(core, make_adapter):
    adapter = make_adapter()
    requests = [greedy_request(f"warm{i}", PROMPT, adapter, ignore_eos=True) for i in range(2)]
    drive(core, requests)
    gc.collect()
    gc.disable()
    try:
        requests = [greedy_request(f"r{i}", PROMPT, adapter, ignore_eos=True) for i in range(2)]
        drive(core, requests)
        # 24 steps of several native calls each: what one leaves, they all leave.
        assert gc.collect() < 24
    finally:
        gc.enable()
