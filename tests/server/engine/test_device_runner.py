"""The GPU's engine under the Triton interpreter: the CPU engine's tokens, overlapped or not."""

from __future__ import annotations

import pytest

from loraplex_scheduler.plan import Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.step_graphs import DirectRecorder, StepGraphs, graph_sizes
from tests.support.engine import drive, make_core, make_device_core, save_adapter
from tests.support.tiny_models import VOCAB, tiny_transformer

# Rows of padding compute on whatever their memory held; numpy would warn of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def model():
    return tiny_transformer("llama")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    geometry = model.spec.geometry
    return [save_adapter(folder, geometry, name=f"a{i}", rank=4 + 2 * i, seed=i) for i in range(3)]


def prompt(length: int, first: int) -> tuple[int, ...]:
    return tuple(3 + (first + 7 * i) % (VOCAB - 3) for i in range(length))


def requests(adapters) -> list[Request]:
    """Return greedy, drawn, penalised and logged requests of several adapters and the base."""
    variants = [
        SamplingParams(max_tokens=5, temperature=0.0),
        SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, seed=3),
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=4, temperature=0.8, top_k=5, seed=4, repetition_penalty=1.3),
        SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, min_tokens=2),
        SamplingParams(max_tokens=5, temperature=1.0, min_p=0.1, seed=5),
    ]
    owners = [None, *adapters]
    return [
        Request(f"r{i}", prompt(3 + 3 * i, i), params, owners[i % 4])
        for i, params in enumerate(variants)
    ]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_tokens_are_those_of_the_cpu(model, adapters, overlap):
    expected = drive(make_core(model, max_step_tokens=32), requests(adapters))
    core = make_device_core(model, max_step_tokens=32, max_running=8, overlap=overlap)
    assert drive(core, requests(adapters)) == expected
    core.close()


def test_tokens_are_the_same_after_evictions_and_preemptions(model, adapters):
    expected = drive(make_core(model), requests(adapters))
    core = make_device_core(
        model, num_pages=13, max_step_tokens=24, max_running=4, max_model_len=64, overlap=True
    )
    assert drive(core, requests(adapters)) == expected
    stats = core.stats()
    assert stats.num_evictions + stats.num_preemptions > 0
    core.close()


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
