"""The engine in its own process: crossing, dying, restarting, stopping."""

from __future__ import annotations

import asyncio
import errno
import functools
import multiprocessing
import os
import signal
import time

import pytest

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import FinishReason, Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine import process
from loraplex_server.engine.errors import EngineConfigError, EngineUnavailable
from loraplex_server.engine.messages import EngineState, FreedMemory
from loraplex_server.engine.process_handle import ProcessEngine, RestartPauses
from loraplex_server.text import grammars
from tests.support.engine import GatedPool, greedy_request, make_core, save_adapter
from tests.support.tiny_models import random_transformer, tiny_spec, tiny_transformer
from tests.support.tiny_tokenizer import make_tokenizer

#: More tokens than a tiny model computes while a test looks on.
ENDLESS = 30_000


def of_tiny_model(build, **options):
    """Return a core factory, told the spec: a process that derives it takes seconds to import."""
    return functools.partial(build, tiny_spec(max_position_embeddings=32_768), **options)


def build_tiny(spec, wake, **options):
    model = random_transformer(spec)
    options = {"num_pages": 2048, "max_model_len": 32_000, **options}
    return make_core(model, wake=wake, **options)


def build_reading(wake):
    """Follow grammars, for which the tokenizer must be told."""
    model = tiny_transformer(vocab_size=300, eos_token_id=0)
    core = make_core(model, wake=wake, tokenizer=make_tokenizer())
    core.learn_tokens("{}")  # what the parent tells replaces it
    return core


def build_gated(spec, wake, *, gate):
    """Load adapters once `gate` exists, and do not look for loads that nobody announces."""
    process.IDLE_S = 600.0
    return build_tiny(spec, wake, make_pool=functools.partial(GatedPool, gate))


def build_nothing(wake):
    raise RuntimeError("no such model")


def build_refused(wake):
    raise EngineConfigError("give the pool more memory")


def build_slowly(spec, wake, *, after=None):
    """Never get ready; or, with the path `after`, only the first time."""
    if after is not None and not after.exists():
        after.touch()
        return build_tiny(spec, wake)
    time.sleep(600)
    return None


def build_announced(spec, wake, *, built):
    core = build_tiny(spec, wake)
    built.touch()
    return core


class FlakyFactory:
    """A core factory that cannot be pickled the second time, as when memory is short."""

    def __init__(self):
        self.num_spawns = 0

    def __call__(self, wake):
        raise AssertionError("this stays with the parent")

    def __reduce__(self):
        self.num_spawns += 1
        if self.num_spawns == 2:
            raise OSError(errno.ENOMEM, "no memory")
        return functools.partial, (of_tiny_model(build_tiny),)


def request(request_id, max_tokens=8, adapter=None):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id, (5, 6, 7), sampling, adapter)


async def start(build_core, **options):
    engine = ProcessEngine(build_core, **options)
    await engine.start()
    return engine


@pytest.fixture
async def engine():
    engine = await start(of_tiny_model(build_tiny))
    yield engine
    await engine.stop()


class Taken:
    """What came of one submission."""

    def __init__(self, engine, requests):
        self.events = []
        self._num_open = len(requests)
        self._ended = asyncio.Event()
        self.cancel = engine.submit(requests, self._take).cancel

    def _take(self, event):
        self.events.append(event)
        self._num_open -= event.finish_reason is not None
        if not self._num_open:
            self._ended.set()

    async def all(self):
        await self._ended.wait()
        return self.events


def submit(engine, *requests):
    return Taken(engine, requests)


async def collect(taken):
    return await taken.all()


async def wait_for(condition, timeout_s=60.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (it depends on another process)
            await asyncio.sleep(0.02)


def block_until(condition):
    """Wait while nothing else runs in the event loop, and a little longer."""
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)


async def stop_quickly(engine):
    async with asyncio.timeout(5.0):
        await engine.stop()


async def assert_stopped(engine):
    """Stopped, without a process, and it stays so."""
    for _ in range(2):
        assert engine.state is EngineState.STOPPED
        assert engine.process_id is None
        assert multiprocessing.active_children() == []
        await asyncio.sleep(1.0)


# ---- requests ------------------------------------------------------------------------------


async def test_several_requests_of_one_submission_each_end_once(engine):
    events = await collect(submit(engine, request("a"), request("b", 4)))
    ends = [e.request_id for e in events if e.finish_reason]
    assert sorted(ends) == ["a", "b"]
    assert len([e for e in events if e.request_id == "b"]) == 4
    assert engine.info.num_pages == 2048


async def test_a_tokenizer_is_told_once_and_known_after_a_restart():
    engine = await start(build_reading)
    tokenizer = make_tokenizer()
    engine.learn_tokens(tokenizer.backend_tokenizer.to_str())
    params = SamplingParams(max_tokens=20, grammar=grammars.choice(["hello", "world"]))
    for name in ("before", "after"):
        taken = Taken(engine, [Request(name, (5, 6, 7), params)])
        events = await taken.all()
        text = tokenizer.decode([e.token.token_id for e in events], skip_special_tokens=True)
        assert text in ("hello", "world")
        if name == "before":
            os.kill(engine.process_id, signal.SIGKILL)
            await wait_for(lambda: engine.num_restarts == 1 and engine.state is EngineState.READY)
    await engine.stop()


async def test_what_is_cancelled_gives_its_pages_back(engine):
    stream = submit(engine, request("a", ENDLESS))
    await wait_for(lambda: engine.stats.num_running == 1)
    stream.cancel()
    await wait_for(lambda: engine.stats.num_running == 0 and engine.stats.pages_kv == 0)
    assert engine.stats.generated_tokens < ENDLESS


async def test_a_cancelled_request_gets_its_event(engine):
    stream = submit(engine, request("a", ENDLESS), request("b", 4))
    stream.cancel(["a"])
    reasons = {e.request_id: e.finish_reason for e in await collect(stream) if e.finish_reason}
    assert reasons == {"a": FinishReason.CANCELLED, "b": FinishReason.LENGTH}


async def test_a_live_request_id_is_refused_and_its_stream_goes_on(engine):
    stream = submit(engine, request("a", ENDLESS))
    with pytest.raises(ValueError, match="in use"):
        submit(engine, request("b"), request("a"))
    with pytest.raises(ValueError, match="in use"):
        submit(engine, request("c"), request("c"))
    stream.cancel()
    assert (await collect(stream))[-1].finish_reason is FinishReason.CANCELLED
    assert len(await collect(submit(engine, request("a")))) == 8


async def test_a_load_wakes_the_idle_engine(tmp_path):
    gate = tmp_path / "gate"
    adapter = save_adapter(tmp_path, tiny_spec().geometry)
    engine = await start(of_tiny_model(build_gated, gate=gate))
    stream = submit(engine, greedy_request("r", [5, 6], adapter, max_tokens=3, ignore_eos=True))
    await wait_for(lambda: engine.stats.loading == ("a",))
    gate.touch()
    async with asyncio.timeout(10.0):
        assert len(await collect(stream)) == 3
    await engine.stop()


async def test_a_load_is_booked_although_its_request_was_cancelled(tmp_path):
    gate = tmp_path / "gate"
    adapter = save_adapter(tmp_path, tiny_spec().geometry)
    engine = await start(of_tiny_model(build_gated, gate=gate))
    stream = submit(engine, request("r", adapter=adapter))
    await wait_for(lambda: engine.stats.loading == ("a",))
    stream.cancel()
    assert (await collect(stream))[-1].finish_reason is FinishReason.CANCELLED
    gate.touch()
    await wait_for(lambda: list(engine.stats.resident) == ["a"], 10.0)
    assert engine.stats.loading == ()
    await engine.stop()


async def test_a_hint_wakes_the_idle_engine(engine, tmp_path):
    engine.prefetch(save_adapter(tmp_path, tiny_spec().geometry))
    await wait_for(lambda: list(engine.stats.resident) == ["a"], 10.0)


# ---- dying and restarting ------------------------------------------------------------------


async def test_when_the_process_dies_requests_fail_once_and_it_comes_back(engine):
    stream = submit(engine, request("a", ENDLESS))
    os.kill(engine.process_id, signal.SIGKILL)
    events = await collect(stream)
    assert [e.finish_reason for e in events if e.finish_reason] == [FinishReason.FAILED]
    assert engine.state is EngineState.RESTARTING
    with pytest.raises(EngineUnavailable) as refused:
        submit(engine, request("b"))
    assert refused.value.retry_after_s >= 1.0
    with pytest.raises(EngineUnavailable):
        engine.prefetch(AdapterManifest("a", "a.safetensors", ()))
    await wait_for(lambda: engine.state is EngineState.READY)
    assert engine.num_restarts == 1
    assert len(await collect(submit(engine, request("c")))) == 8


async def test_a_spawn_that_fails_is_one_more_failure_of_a_run():
    factory = FlakyFactory()
    engine = await start(factory)
    os.kill(engine.process_id, signal.SIGKILL)
    await wait_for(lambda: engine.num_restarts == 2)
    await wait_for(lambda: engine.state is EngineState.READY)
    assert factory.num_spawns == 3
    await engine.stop()


def test_pauses_grow_while_runs_end_early_and_a_good_run_resets_them():
    pauses = RestartPauses()
    assert [pauses.next_s(1.0) for _ in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [pauses.next_s(60.0), pauses.next_s(0.0)] == [0.5, 1.0]


# ---- engines that cannot start -------------------------------------------------------------


async def test_an_engine_that_cannot_start_says_why(capfd):
    engine = ProcessEngine(build_nothing)
    with pytest.raises(EngineConfigError, match=r"^RuntimeError: no such model$"):
        await engine.start()
    assert "Traceback" in capfd.readouterr().err
    await engine.stop()


async def test_an_expected_failure_is_its_message_alone(capfd):
    engine = ProcessEngine(build_refused)
    with pytest.raises(EngineConfigError, match=r"^give the pool more memory$"):
        await engine.start()
    assert capfd.readouterr().err == ""
    await engine.stop()


async def test_a_factory_that_cannot_be_pickled_fails_the_start():
    engine = ProcessEngine(lambda wake: None)
    async with asyncio.timeout(5.0):
        with pytest.raises(EngineConfigError, match="spawned"):
            await engine.start()
    await stop_quickly(engine)


async def test_a_start_that_takes_too_long_is_named_and_killed():
    engine = ProcessEngine(of_tiny_model(build_slowly), start_timeout_s=0.5)
    async with asyncio.timeout(5.0):
        with pytest.raises(EngineConfigError, match=r"not ready after 0\.5 s"):
            await engine.start()
    await assert_stopped(engine)


# ---- stopping ------------------------------------------------------------------------------


async def test_stopping_ends_open_requests_as_cancelled(engine):
    stream = submit(engine, request("a", ENDLESS))
    await stop_quickly(engine)
    assert (await collect(stream))[-1].finish_reason is FinishReason.CANCELLED
    await engine.stop()
    await assert_stopped(engine)
    with pytest.raises(EngineUnavailable):
        submit(engine, request("b"))


async def test_stopping_while_it_starts_is_not_undone():
    engine = ProcessEngine(of_tiny_model(build_slowly))
    starting = asyncio.create_task(engine.start())
    await wait_for(lambda: engine.process_id is not None)
    await stop_quickly(engine)
    with pytest.raises(EngineUnavailable, match="stopped"):
        await starting
    await assert_stopped(engine)


async def test_stopping_the_moment_it_gets_ready_is_not_undone(tmp_path):
    built = tmp_path / "built"
    engine = ProcessEngine(of_tiny_model(build_announced, built=built))
    starting = asyncio.create_task(engine.start())
    await wait_for(lambda: engine.process_id is not None)
    block_until(built.exists)  # and so `Ready` waits in the loop behind `stop`
    await stop_quickly(engine)
    with pytest.raises(EngineUnavailable, match="stopped"):
        await starting
    await assert_stopped(engine)


async def test_stopping_between_two_processes_is_not_undone(engine):
    os.kill(engine.process_id, signal.SIGKILL)
    await wait_for(lambda: engine.state is EngineState.RESTARTING and engine.process_id is None)
    await stop_quickly(engine)
    await assert_stopped(engine)


async def test_stopping_while_it_restarts_is_not_undone(tmp_path):
    engine = await start(of_tiny_model(build_slowly, after=tmp_path / "was here"))
    os.kill(engine.process_id, signal.SIGKILL)
    await wait_for(lambda: engine.process_id is None)
    await wait_for(lambda: engine.process_id is not None)
    await stop_quickly(engine)
    await assert_stopped(engine)


async def test_a_frozen_process_is_killed_after_its_grace(engine, monkeypatch):
    monkeypatch.setattr("loraplex_server.engine.process_handle._STOP_S", 0.5)
    os.kill(engine.process_id, signal.SIGSTOP)
    await stop_quickly(engine)
    await assert_stopped(engine)


async def test_signals_to_the_whole_group_leave_the_engine_to_its_parent(engine):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(engine.process_id, number)
    assert len(await collect(submit(engine, request("a")))) == 8
    assert engine.num_restarts == 0


async def test_signals_do_not_strike_a_process_that_is_being_born():
    engine = ProcessEngine(of_tiny_model(build_tiny))
    starting = asyncio.create_task(engine.start())
    await wait_for(lambda: engine.process_id is not None)
    os.kill(engine.process_id, signal.SIGTERM)
    os.kill(engine.process_id, signal.SIGINT)
    await starting
    await engine.stop()


async def test_what_a_discard_freed_is_told_when_it_is_free(engine, tmp_path):
    adapter = save_adapter(tmp_path, tiny_spec().geometry)
    await collect(submit(engine, request("r", adapter=adapter)))
    engine.discard_adapter(adapter.adapter_id)
    freed = await engine.freed(adapter.adapter_id)
    assert freed.weight_pages > 0
    await wait_for(lambda: not engine.stats.resident)
    assert engine.stats.pages_adapters == 0
    assert await engine.freed(adapter.adapter_id) == FreedMemory()


async def test_a_discard_of_a_loading_adapter_is_told_when_the_load_has_ended(tmp_path):
    gate = tmp_path / "gate"
    engine = await start(of_tiny_model(build_gated, gate=gate), start_timeout_s=60.0)
    stream = submit(engine, request("r", adapter=save_adapter(tmp_path, tiny_spec().geometry)))
    await wait_for(lambda: engine.stats.loading)
    stream.cancel()
    await collect(stream)
    engine.discard_adapter("a")
    waiting = asyncio.ensure_future(engine.freed("a"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    gate.touch()
    assert (await waiting).weight_pages > 0
    await engine.stop()


async def test_a_discard_is_over_when_the_process_is(engine, tmp_path):
    adapter = save_adapter(tmp_path, tiny_spec().geometry)
    await collect(submit(engine, request("r", adapter=adapter)))
    os.kill(engine.process_id, signal.SIGSTOP)
    engine.discard_adapter(adapter.adapter_id)
    os.kill(engine.process_id, signal.SIGKILL)
    assert await engine.freed(adapter.adapter_id) == FreedMemory()
