"""The GPU's engine under the Triton interpreter: the CPU engine's logits and tokens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, Request, SequenceStep, StepResult
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine import gpu_engine
from loraplex_server.engine.gpu_engine import (
    largest_plan,
    make_device_runner,
    measure_step_bytes,
    warm_up,
)
from loraplex_server.engine.runner import Landed
from loraplex_server.engine.step_graphs import DirectRecorder, StepGraphs, graph_sizes
from tests.support.engine_gpu_checks import ENGINE_CHECKS, GPU_ONLY
from tests.support.tiny_models import tiny_spec, tiny_transformer

HERE = [(name, check) for name, check in ENGINE_CHECKS if check not in GPU_ONLY]


# Rows of padding compute on whatever their memory held; numpy would warn of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), HERE, ids=[name for name, _ in HERE])
def test_the_interpreted_engine(name, check):
    check(torch.device("cpu"))


def test_a_step_takes_the_next_larger_graph():
    assert graph_sizes(1) == (1,)
    assert graph_sizes(4) == (1, 2, 4)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)
    calls = []
    graphs = StepGraphs(lambda rows, has_lora: calls.append((rows, has_lora)), 20, DirectRecorder())
    graphs.record_all()
    for num_rows in (1, 3, 9, 20):
        graphs.replay(graphs.padded(num_rows), has_lora=num_rows > 4)
    assert calls == [(1, False), (4, False), (16, True), (20, True)]


def test_the_largest_plan_fills_a_step():
    layout = PoolLayout(tiny_spec().geometry)
    plan = largest_plan(layout, max_step_tokens=100, max_running=4, max_model_len=128)
    assert sum(step.num_tokens for step in plan.sequences) == 100
    pages = [page for step in plan.sequences for page in step.block_table]
    assert len(set(pages)) == len(pages) == 4 * 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_measuring_a_step_leaves_nothing_behind(monkeypatch):
    pools = []

    def make_pool(*args, **options):
        pool = PagePool(*args, **options)
        pools.append(weakref.ref(pool))
        return pool

    alive_at_empty_cache = []
    monkeypatch.setattr(gpu_engine, "PagePool", make_pool)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(
        torch.cuda,
        "empty_cache",
        lambda: alive_at_empty_cache.append(sum(pool() is not None for pool in pools)),
    )
    model = tiny_transformer()
    layout = PoolLayout(model.spec.geometry)
    gc.disable()
    try:
        num_bytes = measure_step_bytes(model, layout, max_step_tokens=4, max_running=2)
    finally:
        gc.enable()
    assert num_bytes == 999_000 - 2 * layout.page_bytes(4)
    assert len(pools) == 1
    assert alive_at_empty_cache == [0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_closed_runner_holds_no_recording():
    # NCCL gives a group up only when every graph that holds a collective of it is gone.
    recorded = []

    class Noting:
        def record(self, run):
            def replay():
                run()

            recorded.append(weakref.ref(replay))
            return replay

    model = tiny_transformer()
    pool = PagePool(PoolLayout(model.spec.geometry), 8, dtype=model.dtype)
    runner = make_device_runner(model, pool, max_step_tokens=4, max_running=2, recorder=Noting())
    assert all(replay() is not None for replay in recorded)
    runner.close()
    assert recorded
    assert all(replay() is None for replay in recorded)


def test_warming_up_launches_prefill_and_adapters_in_the_first_page_only():
    model = tiny_transformer()
    layout = PoolLayout(model.spec.geometry)
    pool = PagePool(layout, 8, dtype=model.dtype)
    sizes = {"max_step_tokens": 12, "max_running": 2}
    runner = make_device_runner(model, pool, **sizes)
    plans = []

    class Noted:
        def launch(self, plan):
            plans.append(plan)
            return runner.launch(plan)

    warm_up(Noted(), layout, **sizes, max_model_len=model.max_model_len)
    assert [[step.num_tokens for step in plan.sequences] for plan in plans] == [[12], [12], [1]]
    for plan in plans:
        assert [step.adapter_id for step in plan.sequences] == list(plan.adapters)
    assert [plan.sequences[0].request.adapter_weight for plan in plans] == [1.0, 0.5, 0.5]
    assert (pool.data[:, 0] != 0).any()
    assert (pool.data[:, 1:] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("max_sharing", "num_replays"), [(4, 1), (1, 0)])
def test_sequences_that_share_pages_are_computed_with_a_graph_or_without(
    monkeypatch, max_sharing, num_replays
):
    """Four decodes over the same three pages of a pool of eight: twelve page ids."""
    monkeypatch.setattr(gpu_engine, "_MAX_SHARING", max_sharing)
    model = tiny_transformer()
    layout = PoolLayout(model.spec.geometry)
    pool = PagePool(layout, 8, dtype=model.dtype)
    runner = make_device_runner(model, pool, max_step_tokens=64, max_running=4)
    replays = []
    replay = StepGraphs.replay
    monkeypatch.setattr(
        StepGraphs, "replay", lambda self, *args: (replays.append(args), replay(self, *args))
    )
    num_tokens = 2 * layout.page_tokens
    prompt = tuple(3 + i % 50 for i in range(num_tokens))
    requests = [
        Request(f"r{i}", prompt, SamplingParams(max_tokens=4, temperature=0.0)) for i in range(4)
    ]
    tables = [(5, 2, page) for page in (0, 1, 3, 4)]
    prefill = SequenceStep(requests[0], 0, num_tokens, prompt, tables[0], is_sampled=True)
    runner.launch(Plan((prefill,), (), {})).result()
    decodes = [
        SequenceStep(request, num_tokens, 1, (7,), table, is_sampled=True)
        for request, table in zip(requests, tables, strict=True)
    ]
    tokens = runner.launch(Plan(tuple(decodes), (), {})).result().tokens
    alone = runner.launch(Plan((decodes[0],), (), {})).result().tokens["r0"]
    assert tokens == dict.fromkeys(("r0", "r1", "r2", "r3"), alone)
    assert len(replays) == num_replays + 1, "the one alone has a graph"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"max_step_tokens": 2048, "max_running": 256, "max_model_len": 8192}, [2048]),
        ({"max_step_tokens": 100, "max_running": 2, "max_model_len": 31}, [30, 30]),
        ({"max_step_tokens": 1, "max_running": 1, "max_model_len": 8}, [1]),
        ({"max_step_tokens": 4, "max_running": 4, "max_model_len": 1}, [1] * 4),
    ],
)
def test_the_warm_up_is_as_long_as_the_limits_allow(sizes, expected):
    found = []

    class Silent:
        def launch(self, plan):
            if plan.sequences[0].request.adapter_weight == 1.0:
                found.extend(step.num_tokens for step in plan.sequences)
            return Landed(StepResult({}))

    warm_up(Silent(), PoolLayout(tiny_spec().geometry), **sizes)
    assert found == expected
