"""One replica over several processes: what they compute together, and how they end together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import resource_tracker

import pytest
import torch

from loraplex_scheduler.plan import EndEvent, FinishReason, Pooling, PromptEvent, Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server import build
from loraplex_server.config import Config
from loraplex_server.engine.errors import EngineConfigError, RankLost
from loraplex_server.engine.messages import EngineState
from loraplex_server.engine.ranks import workers
from loraplex_server.engine.runner import Runner
from tests.support.engine import finish, greedy_request, save_adapter
from tests.support.processes import children_of, is_alive, wait_until_dead
from tests.support.rank_builds import (
    build_elsewhere,
    build_stopping,
    build_with_heir,
    build_without_memory,
)
from tests.support.tiny_models import save_tiny_model, tiny_spec

MIB = 1 << 20

#: More tokens than the tiny model computes while a test looks on.
ENDLESS = 3_900


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "model", max_position_embeddings=4096)
    return folder


def config_of(folder, **settings):
    sizes = {"pool_bytes": 2 * MIB, "host_bytes": MIB, "dtype": "float32", "threads": 2}
    return Config(**{"model": str(folder / "model"), **sizes, **settings})


@pytest.fixture
def start(folder):
    """Return a function that builds an engine on `n` ranks; none of them survives the test."""
    resource_tracker.ensure_running()
    before = set(children_of(os.getpid()))
    cores = []

    def start(num_ranks, build_rank=build.build_rank, timeout_s=60.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "build_rank", build_rank)
            config = config_of(folder, tensor_parallel=num_ranks)
            facts = build.resolve_facts(config)
            # In a thread that ends: no rank may end with it.
            with ThreadPoolExecutor(1) as thread:
                core = thread.submit(build.build_core, config, facts, rank_timeout_s=timeout_s)
            cores.append(core.result())
        return cores[-1], sorted(set(children_of(os.getpid())) - before)

    yield start
    for core in cores:
        core.close()
    assert set(children_of(os.getpid())) <= before


# ---- computing together --------------------------------------------------------------------


def test_two_ranks_serve_what_one_serves_and_forget_what_is_deleted(
    start, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(tmp_path, tiny_spec().geometry)
    relative = save_adapter(tmp_path, tiny_spec().geometry, name="b", seed=2)
    relative = replace(relative, path="b.safetensors")
    logged = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2, logprobs=1)
    plain = SamplingParams(max_tokens=1, temperature=0.0)
    requests = [
        *(greedy_request(f"r{i}", [5, 6 + i], adapter if i % 2 else None) for i in range(4)),
        Request("drawn", (5, 6), SamplingParams(max_tokens=9, seed=4), adapter),
        Request("logged", (5, 6, 7, 8), logged, adapter),
        Request("embedded", (5, 6, 7), plain, adapter, pooling=Pooling.MEAN),
    ]
    alone, _ = start(1)
    core, _ = start(2, build_elsewhere)
    expected, ours = finish(alone, requests), finish(core, requests)
    assert {i: tokens_of(own) for i, own in ours.items()} == {
        i: tokens_of(own) for i, own in expected.items()
    }
    assert values_of(ours) == pytest.approx(values_of(expected), abs=1e-4)
    one, two = alone.stats(), core.stats()
    assert (two.host_bytes, two.pages_adapters) == (one.host_bytes, one.pages_adapters)
    assert core.info == replace(alone.info, device="2 x cpu")

    failed, served = (
        finish(core, [greedy_request(r, [5, 6], a)])[r]
        for r, a in (("f", relative), ("s", adapter))
    )
    assert failed[-1].finish_reason is FinishReason.FAILED
    assert "on rank 1, the adapter could not be loaded" in failed[-1].message
    assert "loraplex_server.engine.loader [rank 1]: adapter b could not" in capfd.readouterr().err
    assert served[-1].finish_reason is FinishReason.LENGTH

    assert core.discard_adapter("a").host_bytes == one.host_bytes
    core.discard_adapter("b")  # rank 0 has its part
    until(lambda: not core.holds_adapter("a") and not core.holds_adapter("b"))
    assert core.stats().host_bytes == 0


def tokens_of(events):
    return [getattr(event, "token", (None,))[0] for event in events], events[-1].finish_reason


def values_of(events):
    """Return every number that was reported besides tokens."""
    numbers = []
    for own in events.values():
        for event in own:
            if isinstance(event, PromptEvent):
                numbers += [logprobs.logprob for logprobs in event.logprobs]
            elif isinstance(event, EndEvent):
                numbers += event.embedding or ()
    assert len(numbers) > 3
    return numbers


def until(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- ending together -----------------------------------------------------------------------


def test_a_step_raises_in_time_when_a_rank_hangs_and_none_survives(start):
    core, ranks = start(2, timeout_s=5.0)
    core.add(greedy_request("r", [5, 6], max_tokens=ENDLESS, ignore_eos=True))
    core.step()
    os.kill(ranks[0], signal.SIGSTOP)
    with pytest.raises(RankLost, match=r"^a step was not computed in 5 s: one of 2 ranks hangs$"):
        run_on(core)
    until(lambda: are_gone(ranks))


def test_a_step_that_was_broken_off_is_the_last(start, monkeypatch):
    core, ranks = start(2)
    request = greedy_request("r", [5, 6], max_tokens=ENDLESS, ignore_eos=True)
    core.add(request)
    core.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_compute", interrupt)  # of this process, rank 0
        with pytest.raises(KeyboardInterrupt):
            core.step()
    # The other rank waits for what this one has not sent, and would take the next step's for it.
    with pytest.raises(RankLost, match=r"^a step was broken off on rank 0 by KeyboardInterrupt$"):
        core.step()
    assert are_gone(ranks)


@pytest.mark.parametrize("build_rank", [build.build_rank, build_with_heir])
def test_an_engine_closes_in_time_where_a_rank_hangs_with_a_full_pipe(start, build_rank):
    core, ranks = start(2, build_rank)
    heirs = children_of(ranks[0])
    os.kill(ranks[0], signal.SIGSTOP)
    # More than a pipe holds: that thread stays in it.
    filling = threading.Thread(target=core.discard_adapter, args=("a" * MIB,), daemon=True)
    filling.start()
    filling.join(1.0)
    assert filling.is_alive()
    try:
        check_closes_in_time(core)
    finally:
        for pid in (*ranks, *heirs):
            kill_if_alive(pid)
    filling.join()


def test_an_engine_closes_in_time_where_a_step_ends_meanwhile(start):
    core, ranks = start(2)
    workers = core._loader._peers._workers
    os.kill(ranks[0], signal.SIGSTOP)
    fill(workers._ends[1])
    begun, is_over = threading.Event(), threading.Event()

    def step():
        with workers.due():
            begun.set()
            is_over.wait()

    def end_step():
        until(workers._sending.locked)  # by `close`, which hangs in the full pipe
        is_over.set()

    stepping, ending = (threading.Thread(target=target) for target in (step, end_step))
    stepping.start()
    begun.wait()
    ending.start()
    try:
        check_closes_in_time(core)
    finally:
        kill_if_alive(ranks[0])
    stepping.join()
    ending.join()


def check_closes_in_time(core):
    closing = threading.Thread(target=core.close, daemon=True)
    closing.start()
    closing.join(60.0)
    assert not closing.is_alive()


def kill_if_alive(pid):
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)


def fill(end):
    """Fill a pipe that nobody reads."""
    os.set_blocking(end.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end.fileno(), bytes(MIB))
    os.set_blocking(end.fileno(), True)


def test_a_load_that_never_ends_on_one_rank_fails_in_time(start, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(tmp_path, tiny_spec().geometry)
    os.mkfifo(folder / "model" / "a.safetensors")  # and nobody ever writes to it
    core, ranks = start(2, build_elsewhere, timeout_s=2.0)
    request = greedy_request("r", [5, 6], replace(adapter, path="a.safetensors"))
    (end,) = finish(core, [request])["r"]
    assert end.finish_reason is FinishReason.FAILED
    assert end.message.endswith("rank 1 of 2 has not loaded adapter a in 2 s")
    until(lambda: are_gone(ranks))


def run_on(core):
    while core.has_work:
        core.step()


def test_a_start_that_fails_on_one_rank_names_it(start):
    with pytest.raises(
        EngineConfigError, match=r"^rank 1 of 2: MemoryError: no room for the arena"
    ):
        start(2, build_without_memory)


def test_what_fails_on_rank_0_when_others_serve_is_not_put_on_them(start, monkeypatch):
    def fail(*_, peers, **__):
        with peers._workers.due():  # as in a step that warms a GPU up
            raise RuntimeError("no memory for the largest step")

    monkeypatch.setattr(build, "assemble_core", fail)
    with pytest.raises(RuntimeError, match=r"^no memory for the largest step$"):
        start(2)


def test_what_a_rank_cannot_be_sent_is_named():
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"<lambda>"):
        workers.RankWorkers(2, lambda seat, on_loaded: None)


@pytest.mark.parametrize(
    ("stops_in", "message"),
    [
        (
            "load",
            r"rank 1 of 2 has not loaded its part of the model 0\.5 s after rank 0: it hangs; see "
            r"what it logged last \(its lines say rank 1\), and its disk and device",
        ),
        ("join", "the ranks have not met in 4 s: one of 2 ranks hangs"),
        (
            "agree",
            r"rank 1 of 2 has not told what it has room for 0\.5 s after rank 0: it hangs; .*",
        ),
    ],
)
def test_a_start_in_which_a_rank_hangs_fails_in_time_and_says_so(monkeypatch, stops_in, message):
    monkeypatch.setattr(workers, "_LOAD_LAG_S", 0.5 if stops_in == "load" else 60.0)
    monkeypatch.setattr(workers, "_START_S", 4.0 if stops_in == "join" else 60.0)
    resource_tracker.ensure_running()
    before = set(children_of(os.getpid()))
    ranks = workers.RankWorkers(2, functools.partial(build_stopping, stops_in))
    (pid,) = set(children_of(os.getpid())) - before

    def begin():
        with ranks.starting():
            ranks.join(torch.device("cpu"))
            monkeypatch.setattr(workers, "_START_S", 0.5)
            ranks.agree(1)

    with pytest.raises(EngineConfigError, match=f"^{message}$"):
        begin()
    wait_until_dead(pid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 5}, "tensor_parallel is 5 and the model has 4 attention heads"),
        ({"tensor_parallel": 2, "quantization": "int8"}, "quantization is int8 and tensor_para"),
    ],
)
def test_what_cannot_be_cut_is_refused(folder, settings, message):
    config = config_of(folder, **settings)
    with pytest.raises(EngineConfigError, match=message):
        build.build_core(config, build.resolve_facts(config))


# ---- in a process of its own ---------------------------------------------------------------


@pytest.fixture
async def engine(folder):
    config = config_of(folder, tensor_parallel=2)
    engine = build.build_engine_handle(config, build.resolve_facts(config))
    await engine.start()
    yield engine
    await engine.stop()


async def test_no_rank_survives_another_and_the_replica_comes_back(engine):
    for victim in (1, 0):
        ranks = ranks_of(engine)
        streams = [Stream(engine, f"{victim}-{i}") for i in range(3)]
        await wait_for(lambda: engine.stats.num_running == 3)
        if victim == 0:
            os.kill(ranks[1], signal.SIGSTOP)  # which reads no closed pipe
        os.kill(ranks[victim], signal.SIGKILL)
        async with asyncio.timeout(60.0):
            reasons = [await stream.end() for stream in streams]
        assert reasons == [FinishReason.FAILED] * 3
        await wait_for(functools.partial(are_gone, ranks))
        await wait_for(lambda: engine.state is EngineState.READY)
    assert await Stream(engine, "after", 4).end() is FinishReason.LENGTH
    assert engine.num_restarts == 2
    ranks = ranks_of(engine)
    await engine.stop()
    assert are_gone(ranks)


def ranks_of(engine):
    lead = engine.process_id
    (other,) = children_of(lead)
    return [lead, other]


def are_gone(ranks):
    return not any(map(is_alive, ranks))


class Stream:
    """One request on its way."""

    def __init__(self, engine, request_id, max_tokens=ENDLESS):
        self._ended = asyncio.get_running_loop().create_future()
        request = greedy_request(request_id, [5, 6], max_tokens=max_tokens, ignore_eos=True)
        engine.submit([request], self._take)

    def _take(self, event):
        if event.finish_reason is not None:
            self._ended.set_result(event.finish_reason)

    async def end(self):
        return await self._ended


async def wait_for(condition):
    async with asyncio.timeout(120.0):
        while not condition():  # noqa: ASYNC110  (it depends on another process)
            await asyncio.sleep(0.02)
