"""With steps overlapped, requests get what they get without, and the device never waits.

A CPU runner computes when it launches, so what is tested here is the order of things and the
hand-over of tokens, on a real model; that the device is busy meanwhile is not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from loraplex_memory.adapter_file import read_adapter_file, write_adapter_file
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_scheduler.plan import EndEvent, FinishReason, Request, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.core import EngineCore
from tests.support.engine import greedy_request, make_core, save_adapter
from tests.support.tiny_models import VOCAB, tiny_transformer

PROMPT = [5, 6, 7, 8]

#: Too small for all adapters and all running sequences.
SMALL = {"num_pages": 16, "max_step_tokens": 64}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take ten times as long at these sizes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    ranks = (2, 4, 8)
    return [
        save_adapter(folder, model.spec.geometry, name=f"a{i}", rank=rank, seed=i)
        for i, rank in enumerate(ranks)
    ]


@pytest.fixture
def make(model):
    """Return a function that makes a core, overlapped or not."""
    cores = []

    def make(overlap, **options):
        core = make_core(model, **{"num_pages": 64, "max_model_len": 64, **options})
        cores.append(core)
        return with_runner(core, core._runner, overlap=overlap)

    yield make
    for core in cores:
        core.close()


def with_runner(core, runner, *, overlap):
    """Return a core of the same parts over another runner."""
    return EngineCore(
        info=core.info,
        scheduler=core.scheduler,
        runner=runner,
        loader=core._loader,
        accounts=core._accounts,
        overlap=overlap,
    )


class Recorder:
    """A runner that notes when steps are launched and when somebody waits for them."""

    def __init__(self, runner, log):
        self._runner, self.log = runner, log
        self.num_launched = 0

    def launch(self, plan):
        self.num_launched += 1
        self.log.append(f"launch {self.num_launched}")
        return RecordedFlight(self._runner.launch(plan), self.num_launched, self.log)


@dataclasses.dataclass
class RecordedFlight:
    flight: object
    number: int
    log: list

    def result(self):
        self.log.append(f"result {self.number}")
        return self.flight.result()


def answers(core, requests, *, steps=2000):
    """Run all to the end; return (tokens with logprobs, end) by id, and check the accounts."""
    tokens = {request.request_id: [] for request in requests}
    ends = {}
    events = [event for request in requests for event in core.add(request)]
    for _ in range(steps):
        for event in events:
            assert event.request_id not in ends, "an event after the terminal one"
            if isinstance(event, TokenEvent):
                tokens[event.request_id].append(event.token)
            if event.finish_reason is not None:
                ends[event.request_id] = event.finish_reason
        if not core.has_work:
            break
        events = core.step(load_timeout_s=5.0)
        core.check()
    assert set(ends) == set(tokens)
    stats = core.stats()
    assert stats.generated_tokens == sum(map(len, tokens.values()))
    assert (stats.num_running, stats.num_waiting, stats.pages_kv) == (0, 0, 0)
    assert core._in_flight is None
    return {i: (tokens[i], ends[i]) for i in tokens}


def mixed_requests(adapters, *, penalties):
    """Every kind of request, on the base and all adapters."""
    kinds = [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "logprobs": 3},
        {"temperature": 0.0, "max_tokens": 1},
        {"temperature": 1.5, "stop_token_ids": frozenset(range(3, 20)), "min_tokens": 3},
        {"temperature": 1.0, "top_k": 9, "logit_bias": {4: 5.0}, "ignore_eos": True},
        {"temperature": 0.0, "max_tokens": 50, "ignore_eos": True},
    ]
    if penalties:
        kinds.append({"temperature": 0.9, "presence_penalty": 1.5, "repetition_penalty": 1.2})
    requests = []
    for i, kind in enumerate(kinds):
        for j, adapter in enumerate([None, *adapters]):
            sampling = SamplingParams(**{"max_tokens": 10, "seed": 31 * i + j, **kind})
            prompt = tuple(3 + (7 * k + i + j) % (VOCAB - 3) for k in range(3 + 5 * i % 23 + 9 * j))
            requests.append(Request(f"{i}-{j}", prompt, sampling, adapter, arrival_s=float(i)))
    return requests


@pytest.mark.parametrize(
    ("options", "penalties"),
    [
        ({}, False),
        ({"max_step_tokens": 16, "max_running": 12}, False),
        (SMALL, False),
        (SMALL, True),
    ],
    ids=["roomy", "chunks", "small-pool", "small-pool-penalties"],
)
def test_every_answer_is_that_of_the_sequential_engine(make, adapters, options, penalties):
    requests = mixed_requests(adapters, penalties=penalties)
    sequential, overlapped = make(False, **options), make(True, **options)
    expected = answers(sequential, requests)
    assert answers(overlapped, requests) == expected
    ends = {end for _, end in expected.values()}
    assert ends == {FinishReason.STOP, FinishReason.LENGTH}
    if options is SMALL:
        # How many depends on when loads end; that neither engine has any would be a roomy pool.
        stats = [core.stats() for core in (sequential, overlapped)]
        assert sum(one.num_preemptions for one in stats) > 0
        assert sum(one.num_evictions for one in stats) > 0


def test_a_step_is_launched_before_anybody_waits_for_the_last_one(make):
    core, log = make(True), []
    core = with_runner(core, Recorder(core._runner, log), overlap=True)
    answers(core, [greedy_request("r", PROMPT, max_tokens=4, ignore_eos=True)])
    assert log == [
        "launch 1",
        *("launch 2", "result 1"),
        *("launch 3", "result 2"),
        *("launch 4", "result 3"),
        "result 4",
    ]


def test_penalties_wait_for_the_step_before(make):
    core, log = make(True), []
    core = with_runner(core, Recorder(core._runner, log), overlap=True)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, presence_penalty=1.0, ignore_eos=True)
    answers(core, [Request("r", tuple(PROMPT), sampling)])
    assert log == ["launch 1", "result 1", "launch 2", "result 2"]


def test_a_load_is_submitted_after_the_launch_before_and_before_the_next(
    make, adapters, monkeypatch
):
    core, log = make(True), []
    core = with_runner(core, Recorder(core._runner, log), overlap=True)
    submit = core._loader.submit
    monkeypatch.setattr(core._loader, "submit", lambda load: (log.append("load"), submit(load)))
    core.add(greedy_request("base", PROMPT, ignore_eos=True))
    core.step()
    core.add(greedy_request("tuned", PROMPT, adapters[0]))
    core.step()
    assert log == ["launch 1", "load", "launch 2", "result 1"]


def test_counters_do_not_depend_on_overlap(make, adapters):
    requests = mixed_requests(adapters, penalties=False)
    stats = []
    for overlap in (False, True):
        core = make(overlap, num_pages=512)
        answers(core, requests)
        stats.append(core.stats())
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    assert [s.prompt_tokens for s in stats] == [prompt_tokens] * 2
    assert stats[0].generated_tokens == stats[1].generated_tokens
    assert stats[0].num_loads == stats[1].num_loads == len(adapters)


def test_a_new_owner_of_a_request_id_gets_its_own_answer(make):
    expected = answers(make(False), [greedy_request("r", PROMPT[::-1], ignore_eos=True)])
    core = make(True)
    core.add(greedy_request("r", PROMPT, ignore_eos=True))
    for _ in range(3):
        core.step()
    (event,) = core.abort("r")
    assert event.finish_reason is FinishReason.CANCELLED
    num_before = core.stats().generated_tokens
    events = core.add(greedy_request("r", PROMPT[::-1], ignore_eos=True))
    while core.has_work:
        events += core.step()
        core.check()
    tokens, end = expected["r"]
    assert [event.token for event in events] == tokens
    assert events[-1].finish_reason is end
    assert core.stats().generated_tokens == num_before + len(tokens)


def test_an_aborted_request_leaves_no_step_in_flight(make):
    core = make(True)
    core.add(greedy_request("r", PROMPT, ignore_eos=True))
    core.step()
    core.abort("r")
    assert core.has_work
    assert core.step() == []
    assert not core.has_work
    assert not core.is_waiting_for_loads
    core.check()


def test_a_request_that_times_out_in_flight_ends_once(make):
    core, now = make(True), [0.0]
    core._clock = lambda: now[0]
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    core.add(Request("r", tuple(PROMPT), sampling, deadline_s=1.0))
    events = core.step() + core.step()
    now[0] = 1.0
    while core.has_work:
        events += core.step()
    assert [event.finish_reason for event in events] == [None, FinishReason.TIMED_OUT]


def test_an_adapter_that_overflows_fails_its_request_once(make, adapters, tmp_path):
    path = tmp_path / "loud.safetensors"
    weights = {
        key: dataclasses.replace(pair, a=pair.a * 1e18, b=pair.b * 1e18)
        for key, pair in read_adapter_file(Path(adapters[0].path)).lora.items()
    }
    write_adapter_file(path, AdapterWeights(weights))
    loud = dataclasses.replace(adapters[0], adapter_id="loud", path=str(path))
    requests = [greedy_request("loud", PROMPT, loud), greedy_request("fine", PROMPT)]
    found = answers(make(True), requests)
    assert found["loud"] == ([], FinishReason.FAILED)
    assert found["fine"] == answers(make(False), requests[1:])["fine"]


def test_while_only_a_load_is_awaited_nothing_is_in_flight(make, adapters):
    core = make(True)
    gone = dataclasses.replace(adapters[0], adapter_id="gone", path="/nowhere/a.safetensors")
    core.add(greedy_request("broken", PROMPT, gone))
    assert core.step() == []
    assert core.is_waiting_for_loads
    (event,) = core.step(load_timeout_s=5.0)
    assert isinstance(event, EndEvent)
    assert not core.has_work


def test_an_error_of_the_runner_reaches_the_caller(make):
    class Broken:
        def launch(self, plan):
            raise RuntimeError("the device is gone")

    core = with_runner(make(True), Broken(), overlap=True)
    core.add(greedy_request("r", PROMPT))
    with pytest.raises(RuntimeError, match="the device is gone"):
        core.step()
