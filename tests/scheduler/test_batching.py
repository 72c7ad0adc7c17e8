"""When newcomers are considered, and whether they are computed beside those who run."""

from __future__ import annotations

from loraplex_scheduler.batching import MixedBatching, SeparatePrefill
from loraplex_scheduler.policies import S_LORA
from tests.support.scheduling import compute, make_request, make_scheduler


def considered(policy, num_steps, *, num_running=5, admits=True):
    """Return in which steps newcomers are considered; each such step admits some."""
    steps = []
    for step in range(num_steps):
        may_admit = policy.may_admit(num_running)
        if may_admit:
            steps.append(step)
        policy.launched(has_admitted=may_admit and admits)
    return steps


def test_mixed_batching_considers_newcomers_in_every_step():
    policy = MixedBatching()
    assert policy.is_mixed
    assert considered(policy, 5) == [0, 1, 2, 3, 4]


def test_separate_prefill_considers_newcomers_every_so_many_decodes():
    policy = SeparatePrefill(admit_every=10)
    assert not policy.is_mixed
    assert considered(policy, 35) == [10, 21, 32]


def test_when_nobody_comes_each_further_step_looks_again():
    policy = SeparatePrefill(admit_every=10)
    assert considered(policy, 14, admits=False) == [10, 11, 12, 13]


def test_an_idle_machine_considers_newcomers_at_once():
    policy = SeparatePrefill(admit_every=10)
    assert considered(policy, 3, num_running=0) == [0, 1, 2]


def test_a_step_of_separate_prefill_computes_prompts_or_tokens():
    scheduler = make_scheduler(256, max_step_tokens=64, max_running=32, choice=S_LORA)
    kinds = []
    for i in range(40):
        scheduler.add(make_request(f"r{i}", num_prompt=6, max_tokens=30, arrival_s=float(i)))
        plan = scheduler.schedule(float(i))
        kinds.append({step.start == 0 for step in plan.sequences})
        compute(scheduler, plan)
    assert all(len(kind) == 1 for kind in kinds)
    assert [i for i, kind in enumerate(kinds) if kind == {True}] == [0, 11, 22, 33]
