from __future__ import annotations

import sys

import pytest

from loraplex_memory.accounts import EvictionCause
from loraplex_scheduler.plan import Plan, Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.step_meter import StepMeter, StepParts
from tests.support.engine import drive, greedy_request, make_core, save_adapter
from tests.support.tiny_models import tiny_transformer


def step(num_prompt: int, start: int, num_tokens: int) -> SequenceStep:
    request = Request("r", tuple(range(num_prompt)), SamplingParams(max_tokens=8))
    return SequenceStep(request, start, num_tokens, tuple(range(num_tokens)), [0], True)


def plan_of(*steps: SequenceStep) -> Plan:
    return Plan(steps, (), {})


def test_tokens_of_prompts_and_of_answers_are_told_apart():
    meter = StepMeter(StepParts())
    # A decode, a whole prompt, a piece of one, and one that computes a prompt and its answer again.
    meter.launched(plan_of(step(4, 6, 1), step(5, 0, 5), step(9, 3, 4), step(4, 2, 5)))
    counts = meter.counts()
    assert (counts.prefill_tokens, counts.decode_tokens) == (5 + 4 + 2, 1 + 3)
    assert counts.tokens.total == 15
    assert counts.sequences.total == 4
    assert sum(counts.tokens.counts) == sum(counts.adapters.counts) == 1


def test_the_work_of_metering_grows_with_sequences_alone():
    """Counted, not timed: function calls and lines of a step of 64 decodes of long sequences."""
    meter = StepMeter(StepParts())
    steps = [step(2000, 2000 + i, 1) for i in range(64)]
    plan = plan_of(*steps)
    num_events = 0

    def count(frame, event, arg):
        nonlocal num_events
        num_events += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        meter.launched(plan)
        meter.took(0.01)
    finally:
        sys.settrace(before)
    assert num_events < 64 * 8 + 60


@pytest.mark.parametrize("cause", EvictionCause)
def test_causes_of_evictions_are_words_of_a_label(cause):
    assert cause.value.isidentifier()


def test_an_engine_counts_its_steps_loads_tiers_and_evictions(tmp_path):
    model = tiny_transformer()
    core = make_core(model, num_pages=12, num_host_pages=64, max_model_len=64)
    geometry = model.spec.geometry
    adapters = [save_adapter(tmp_path, geometry, name=f"a{i}", rank=8, seed=i) for i in range(1, 5)]
    try:
        # One after the other, and the first again: by then the others have taken its pages.
        for number, adapter in enumerate((None, *adapters, adapters[0])):
            drive(core, [greedy_request(f"r{number}", [5, 6, 7, 8], adapter, ignore_eos=True)])
        stats = core.stats()
    finally:
        core.close()
    steps = stats.steps
    assert sum(steps.seconds.counts) == sum(steps.tokens.counts) == stats.num_steps > 0
    assert steps.prefill_tokens == stats.prompt_tokens == 6 * 4
    assert steps.tokens.total == steps.prefill_tokens + steps.decode_tokens
    assert steps.adapters.counts[0] > 0  # steps of the base alone
    assert steps.adapters.total == sum(steps.adapters.counts[1:])
    assert stats.adapter_wants["disk"] == 4
    assert stats.adapter_wants["host"] + stats.adapter_wants["pool"] == 1
    assert stats.evictions_by_cause["adapter"] > 0
    assert sum(stats.evictions_by_cause.values()) == stats.num_evictions
    assert sum(stats.load_seconds["disk"].counts) == 4
    assert sum(stats.load_seconds["host"].counts) == stats.num_host_hits == 1
    assert sum(t.total for t in stats.load_seconds.values()) == pytest.approx(stats.load_s)
    assert all(steps.part_s[part] > 0 for part in ("schedule", "build", "forward", "sample"))
    assert sum(steps.part_s.values()) <= stats.step_s  # they are parts of it, and do not overlap
