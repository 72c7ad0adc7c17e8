"""Adapters of every kind through the whole engine: whatever happens, the same right tokens."""

from __future__ import annotations

import pytest
import torch

from loraplex_scheduler.plan import TokenEvent
from loraplex_scheduler.policies import PolicyChoice
from tests.support.adapter_kinds import PROMPT, PROMPTS, make_request, make_requests, save_kinds
from tests.support.adapter_parts import HEAD_DIM, INVOCATION, expected_logits, make_adapters
from tests.support.engine import drive, make_core
from tests.support.tiny_models import tiny_config, tiny_reference, transformer_of


@pytest.fixture(scope="module", params=["llama", "qwen3"], name="reference")
def _reference(request):
    return tiny_reference(tiny_config(request.param, head_dim=HEAD_DIM))


@pytest.fixture(scope="module", name="weights")
def _weights(reference):
    return {None: None, **make_adapters(reference)}


@pytest.fixture(scope="module", name="manifests")
def _manifests(reference, tmp_path_factory):
    return save_kinds(tmp_path_factory.mktemp("adapters"), make_adapters(reference))


@pytest.fixture(scope="module", name="right")
def _right(reference, weights, manifests):
    """The tokens of every request, checked one by one against the patched models."""
    core = make_core(transformer_of(reference))
    tokens = drive(core, make_requests(manifests))
    core.close()
    for i, prompt in enumerate(PROMPTS):
        for name, adapter in weights.items():
            answer = tokens[f"{name} {i}"]
            seen = [*prompt, *answer[:-1]]
            logits = expected_logits(reference, adapter, seen, len(prompt))[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (logits.amax(1) - chosen).max() < 1e-4, name
    assert len({tuple(answer) for answer in tokens.values()}) > len(weights), "adapters do nothing"
    return tokens


def test_prompts_in_small_chunks(reference, manifests, right):
    core = make_core(transformer_of(reference), max_step_tokens=7, max_running=5)
    assert drive(core, make_requests(manifests)) == right
    core.close()


def test_one_after_the_other(reference, manifests, right):
    core = make_core(transformer_of(reference), max_running=1)
    assert drive(core, make_requests(manifests)) == right
    core.close()


def test_prefixes_found_in_a_second_round(reference, manifests, right):
    core = make_core(transformer_of(reference), num_pages=2048)
    for _ in range(2):
        assert drive(core, make_requests(manifests)) == right
    assert core.stats().prefix_hit_tokens > 16 * len(manifests)
    core.close()


def test_adapters_evicted_and_requests_preempted(reference, manifests, right):
    """A pool that holds no two of the large adapters, beside a few sequences."""
    core = make_core(transformer_of(reference), num_pages=24, max_step_tokens=64)
    requests = make_requests(manifests)
    for _ in range(2):
        assert drive(core, requests) == right
    stats = core.stats()
    assert stats.num_evictions > 10
    assert stats.num_loads > len(manifests)
    core.close()


def test_preempted_requests_recompute_what_their_adapter_changed(reference, manifests, right):
    choice = PolicyChoice(admission="greedy")  # others see to it that nobody must give way
    core = make_core(transformer_of(reference), num_pages=30, max_step_tokens=64, choice=choice)
    for name in ("soft prompt", "kv prefix", "activated", "norms", "scales and biases"):
        requests = [
            make_request(f"{i}", manifests[name], PROMPTS[i % 2], max_tokens=40 + i)
            for i in range(8)
        ]
        tokens = drive(core, requests)
        assert all(tokens[f"{i}"][:6] == right[f"{name} {i % 2}"] for i in range(8)), name
    assert core.stats().num_preemptions > 0
    core.close()


def num_cached(core, request):
    """Run one request; return how much of its prompt was found."""
    events = core.add(request)
    while core.has_work:
        events += core.step(load_timeout_s=5.0)
        core.check()
    assert isinstance(events[0], TokenEvent)
    return events[0].num_cached


def test_an_activated_adapter_shares_the_bases_pages(reference, manifests):
    core = make_core(transformer_of(reference))
    activated = manifests["activated"]
    prompt = PROMPTS[0]  # invoked at 35: two whole pages are the base's
    assert num_cached(core, make_request("base", None, prompt)) == 0
    assert num_cached(core, make_request("a", activated, prompt)) == 32
    assert num_cached(core, make_request("b", activated, (*INVOCATION, *PROMPT))) == 0
    assert num_cached(core, make_request("c", activated, PROMPT)) == 32, "never invoked: the base"
    core.close()


def test_virtual_tokens_share_pages_and_count_for_nobody(reference, manifests):
    core = make_core(transformer_of(reference))
    for name in ("soft prompt", "kv prefix"):
        assert num_cached(core, make_request("a", manifests[name], PROMPT)) == 0
        assert num_cached(core, make_request("b", manifests[name], PROMPT)) == 32 - 6
    core.close()
