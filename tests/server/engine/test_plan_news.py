"""What other ranks are told of a plan. That they compute the same of it: `test_tensor_parallel`."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_scheduler.plan import Plan, PlannedAdapter, Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.ranks.plan_news import PlanHearer, PlanTeller

#: An 8B model's.
GEOMETRY = ModelGeometry(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
)
LAYOUT = PoolLayout(GEOMETRY, num_ranks=2)
PROMPT = range(1000, 3000)


def make_step(index, position, **options):
    """Return a decode of a request that shares nothing with others, as when it has arrived."""
    spec = AdapterSpec(tuple((16,) * 7 for _ in range(32)))
    adapter = AdapterManifest(f"adapter-{index}", "/somewhere/adapter.safetensors", spec)
    request = Request(f"request-{index}", tuple(PROMPT), SamplingParams(), adapter, **options)
    return decode(request, position)


def decode(request, position):
    pages = tuple(range(5000, 5000 + position // 16 + 1))
    return SequenceStep(request, position, 1, (7,), pages, is_sampled=True)


def make_plan(steps):
    adapters = {
        step.adapter_id: PlannedAdapter(
            AdapterLayout(LAYOUT, step.request.adapter.spec), tuple(range(84))
        )
        for step in steps
    }
    return Plan(tuple(steps), loads=(), adapters=adapters)


def test_what_stays_in_the_batch_is_told_once():
    teller, hearer = PlanTeller(), PlanHearer(LAYOUT)
    first = make_plan([make_step(i, 2000) for i in range(64)])
    steps = tuple(decode(step.request, 2001) for step in first.sequences)
    second = replace(first, sequences=steps)
    sizes = []
    for plan in (first, second):
        told = pickle.dumps(teller.tell(plan))
        sizes.append(len(told))
        heard = hearer.hear(pickle.loads(told))
        assert [(s.request_id, s.start, s.token_ids, s.block_table) for s in heard.sequences] == [
            (s.request_id, s.start, s.token_ids, s.block_table) for s in plan.sequences
        ]
        assert heard.adapters == plan.adapters
    assert sizes[1] < len(pickle.dumps(second)) / 8
    assert not teller.tell(second).specs


def test_layouts_are_the_same_objects_as_long_as_they_stay():
    teller, hearer = PlanTeller(), PlanHearer(LAYOUT)
    plan = make_plan([make_step(0, 2000)])
    layouts = [hearer.hear(teller.tell(plan)).adapters["adapter-0"].layout for _ in range(2)]
    assert layouts[0] is layouts[1]


@pytest.mark.parametrize("has_gap", [False, True])
def test_an_id_that_comes_back_is_told_anew(has_gap):
    teller, hearer = PlanTeller(), PlanHearer(LAYOUT)
    hearer.hear(teller.tell(make_plan([make_step(0, 2000)])))
    if has_gap:
        hearer.hear(teller.tell(make_plan([make_step(1, 2000)])))
    again = make_plan([make_step(0, 2000, adapter_weight=0.5)])
    (step,) = hearer.hear(teller.tell(again)).sequences
    assert step.request.adapter_weight == 0.5


def test_only_prompts_that_are_judged_are_told():
    judged = SamplingParams(prompt_logprobs=2, logprobs=3, seed=5)
    for sampling, prompt in ((SamplingParams(logprobs=3), ()), (judged, tuple(PROMPT))):
        step = replace(make_step(0, 2000).request, sampling=sampling, tenant="somebody")
        (request,) = PlanTeller().tell(make_plan([decode(step, 2000)])).requests
        assert request.prompt_token_ids == prompt
        assert (request.sampling.logprobs, request.sampling.seed, request.tenant) == (None, 0, "")
