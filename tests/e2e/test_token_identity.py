"""Greedy tokens in float32 are those of transformers + PEFT, whatever happens on the way."""

from __future__ import annotations

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.policies import PolicyChoice
from tests.e2e.conftest import ADAPTERS
from tests.support.engine import drive, greedy_request, make_core, requests_for

pytestmark = pytest.mark.model

MODELS = (None, *ADAPTERS)


@pytest.fixture(scope="module")
def mixed(model, cases, manifests):
    """All cases in one mixed batch, whole prompts at once."""
    core = make_core(model, max_step_tokens=2048)
    outputs = drive(core, requests_for(cases, manifests))
    core.close()
    return outputs


def test_mixed_batch_of_base_and_all_adapters(mixed, judge):
    judge(mixed, "mixed batch")


@pytest.mark.parametrize("adapter", MODELS)
def test_alone(model, cases, manifests, judge, mixed, adapter):
    mine = [case for case in cases if case[1] == adapter][:1]
    core = make_core(model)
    outputs = drive(core, requests_for(mine, manifests))
    core.close()
    judge(outputs, f"{adapter or 'base'} alone")


def test_chunked_prefill(model, cases, manifests, judge):
    core = make_core(model, max_step_tokens=23, max_running=16)
    outputs = drive(core, requests_for(cases, manifests))
    core.close()
    judge(outputs, "chunks of at most 23 tokens")


def test_after_preemption(model, cases, manifests, judge):
    layout = PoolLayout(model.spec.geometry)
    adapters = sum(AdapterLayout(layout, m.spec).num_pages for m in manifests.values())
    prompts = sum(layout.pages_for_tokens(len(prompt)) for _, _, prompt in cases)
    # Room for every prompt and a page each: the answers take three, so somebody must give way.
    core = make_core(
        model,
        num_pages=adapters + prompts + len(cases),
        max_step_tokens=1024,
        choice=PolicyChoice(admission="greedy"),
    )
    outputs = drive(core, requests_for(cases, manifests, max_tokens=48, ignore_eos=True))
    core.close()
    assert core.scheduler.num_preemptions > 0
    label = f"{core.scheduler.num_preemptions} preemptions"
    judge(outputs, label, max_tokens=48, ignore_eos=True)


def test_after_eviction_and_reload(model, cases, manifests, judge):
    layout = PoolLayout(model.spec.geometry)
    largest = max(AdapterLayout(layout, m.spec).num_pages for m in manifests.values())
    longest = max(layout.pages_for_tokens(len(prompt) + 24) for _, _, prompt in cases)
    core = make_core(
        model, num_pages=largest + 2 * longest, max_model_len=256, num_host_pages=2 * largest
    )
    scheduler = core.scheduler
    outputs = {}
    for _ in range(2):
        for adapter in ADAPTERS:
            mine = [case for case in cases if case[1] == adapter]
            again = drive(core, requests_for(mine, manifests))
            assert all(outputs.get(i, tokens) == tokens for i, tokens in again.items())
            outputs |= again
    assert scheduler.accounts.num_adapter_evictions >= len(ADAPTERS)
    assert 0 < core.stats().num_host_hits < core.stats().num_loads
    core.close()
    judge(outputs, f"{scheduler.accounts.num_adapter_evictions} evictions")


def test_after_prefix_hits(model, cases, manifests, judge, mixed):
    core = make_core(model, max_step_tokens=2048)
    drive(core, requests_for(cases, manifests))
    num_hits = core.scheduler.num_prefix_hits
    again = drive(core, requests_for(cases, manifests))
    num_hits = core.scheduler.num_prefix_hits - num_hits
    core.close()
    assert again == mixed
    assert num_hits > sum(len(prompt) for _, _, prompt in cases) / 2
    judge(again, f"{num_hits} prompt tokens from the prefix cache")


def test_a_conversation_goes_on_behind_its_own_answer(model, cases, manifests, mixed):
    """The second turn starts with what the first one computed, its answer included."""
    turns = [
        (case_id, adapter, (*prompt, *mixed[case_id], *prompt[-8:]))
        for case_id, adapter, prompt in cases
    ]
    fresh = make_core(model, max_step_tokens=2048, choice=PolicyChoice(has_prefix_cache=False))
    expected = drive(fresh, requests_for(turns, manifests))
    fresh.close()
    core = make_core(model, max_step_tokens=2048)
    drive(core, requests_for(cases, manifests))
    before = core.scheduler.num_prefix_hits
    assert drive(core, requests_for(turns, manifests)) == expected
    num_whole_pages = sum((len(prompt) + len(mixed[i]) - 1) // 16 for i, _, prompt in cases)
    assert core.scheduler.num_prefix_hits - before == 16 * num_whole_pages
    core.close()


def test_samples_of_one_prompt_share_its_pages(model, cases, manifests):
    """Admitted in one step, they are computed in that step, each token of the prompt once."""
    _, adapter, prompt = cases[-1]
    core = make_core(model, max_step_tokens=2048, max_running=4)
    requests = [greedy_request(f"s{i}", prompt, manifests[adapter]) for i in range(4)]
    outputs = drive(core, requests)
    core.close()
    assert len({tuple(tokens) for tokens in outputs.values()}) == 1
    num_shared = 16 * ((len(prompt) - 1) // 16)
    assert core.scheduler.num_prefix_hits == 3 * num_shared
    assert core.stats().prompt_tokens == 4 * len(prompt) - 3 * num_shared
