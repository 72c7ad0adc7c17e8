"""The real model on two and four ranks: greedy tokens in float32 are transformers' and PEFT's.

It has 9 heads and 3 KV heads, so both ways of cutting pad them.
"""

from __future__ import annotations

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.model.checkpoint import open_checkpoint
from tests.e2e.conftest import ADAPTERS
from tests.support.engine import drive, requests_for
from tests.support.ranks import ThreadTeam

pytestmark = pytest.mark.model


@pytest.fixture(scope="module", name="state")
def _state(source, model):
    checkpoint = open_checkpoint(source, model.spec)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


@pytest.fixture(scope="module", name="some_cases")
def _some_cases(cases):
    """Half of them: the base and every adapter once. Ranks that share two cores are slow."""
    found = cases[:2] + cases[4::2]
    assert {adapter for _, adapter, _ in found} == {None, *ADAPTERS}
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_through_evictions_preemptions_and_prefix_hits(
    model, state, some_cases, manifests, judge, num_ranks
):
    layout = PoolLayout(model.spec.geometry, num_ranks=num_ranks)
    adapters = sum(AdapterLayout(layout, m.spec).num_pages for m in manifests.values())
    prompts = sum(layout.pages_for_tokens(len(prompt)) for _, _, prompt in some_cases)
    # Room for every prompt and a page each: the answers take two, so somebody must give way.
    team = ThreadTeam(
        model.spec,
        state,
        num_ranks,
        num_pages=adapters + prompts + len(some_cases),
        max_step_tokens=1024,
        max_model_len=512,
        choice=PolicyChoice(admission="greedy"),
    )
    requests = requests_for(some_cases, manifests, ignore_eos=True)
    outputs = drive(team.core, requests)
    judge(outputs, f"{num_ranks} ranks", ignore_eos=True)
    assert drive(team.core, requests) == outputs
    stats = team.core.stats()
    team.close()
    assert stats.num_preemptions > 0
    assert stats.num_evictions > 0
    assert stats.prefix_hit_tokens > 0
