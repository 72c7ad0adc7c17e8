"""The engine in its own process: crossing, dying, restarting, stopping."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from loraplex_scheduler.plan import FinishReason, Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.errors import EngineConfigError, EngineUnavailable
from loraplex_server.engine.messages import EngineState
from loraplex_server.engine.process_handle import ProcessEngine
from tests.support.engine import make_core
from tests.support.tiny_models import tiny_transformer


def build_tiny(wake):
    return make_core(tiny_transformer(), num_pages=64, max_model_len=64)


def build_nothing(wake):
    raise RuntimeError("no such model")


def request(request_id, max_tokens=8):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id, (5, 6, 7), sampling)


@pytest.fixture
async def engine():
    engine = ProcessEngine(build_tiny)
    await engine.start()
    yield engine
    await engine.stop()


async def collect(stream):
    return [event async for event in stream]


async def wait_for(condition, timeout_s=60.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


async def test_several_requests_of_one_submission_each_end_once(engine):
    events = await collect(engine.submit([request("a"), request("b", 4)]))
    ends = [e.request_id for e in events if e.finish_reason]
    assert sorted(ends) == ["a", "b"]
    assert len([e for e in events if e.request_id == "b"]) == 4
    assert engine.info.num_pages == 64


async def test_a_closed_stream_cancels_what_still_runs(engine):
    stream = engine.submit([request("a", 60)])
    await anext(aiter(stream))
    await stream.aclose()
    await wait_for(lambda: engine.stats.num_running == 0 and engine.stats.pages_kv == 0)


async def test_a_cancelled_request_gets_its_event(engine):
    stream = engine.submit([request("a", 60), request("b", 4)])
    stream.cancel(["a"])
    reasons = {e.request_id: e.finish_reason for e in await collect(stream) if e.finish_reason}
    assert reasons == {"a": FinishReason.CANCELLED, "b": FinishReason.LENGTH}


async def test_when_the_process_dies_requests_fail_once_and_it_comes_back(engine):
    # Stopped, so that the answer cannot be complete before the signal that ends it.
    os.kill(engine.process_id, signal.SIGSTOP)
    stream = engine.submit([request("a", 60)])
    os.kill(engine.process_id, signal.SIGKILL)
    events = await collect(stream)
    assert [e.finish_reason for e in events if e.finish_reason] == [FinishReason.FAILED]
    assert engine.state is EngineState.RESTARTING
    with pytest.raises(EngineUnavailable) as refused:
        engine.submit([request("b")])
    assert refused.value.retry_after_s > 0
    await wait_for(lambda: engine.state is EngineState.READY)
    assert engine.num_restarts == 1
    assert len(await collect(engine.submit([request("c")]))) == 8


async def test_stopping_ends_open_requests_as_cancelled(engine):
    os.kill(engine.process_id, signal.SIGSTOP)
    stream = engine.submit([request("a", 60)])
    os.kill(engine.process_id, signal.SIGCONT)
    await engine.stop()
    assert (await collect(stream))[-1].finish_reason is FinishReason.CANCELLED
    await engine.stop()


async def test_an_engine_that_cannot_start_says_why():
    engine = ProcessEngine(build_nothing)
    with pytest.raises(EngineConfigError, match="no such model"):
        await engine.start()
    await engine.stop()
