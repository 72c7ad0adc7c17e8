"""Prompt log probabilities and embeddings against transformers, whoever else is in the step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraplex_scheduler.plan import FinishReason, Pooling, PromptEvent, Request
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine import prompt_reports, runner
from loraplex_server.engine.adapted_prompt import adapt_prompt
from tests.support.adapter_kinds import save_kinds
from tests.support.adapter_parts import HEAD_DIM, make_adapters
from tests.support.engine import drive, finish, greedy_request, make_core, make_device_core
from tests.support.tiny_models import tiny_config, tiny_reference, transformer_of

PROMPT = tuple(3 + (7 * i) % 90 for i in range(45))
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture(scope="module")
def reference():
    return tiny_reference(tiny_config())


@pytest.fixture(scope="module", params=["native", "torch"])
def any_model(request, reference):
    """The model on a CPU with compiled kernels, and without."""
    model = transformer_of(reference)
    if request.param == "torch":
        model._can_decode = False
    return model


def scored(request_id="scored", num_top=3, prompt=PROMPT, **options):
    return Request(
        request_id,
        prompt,
        dataclasses.replace(GREEDY, prompt_logprobs=num_top, **options),
    )


def pooled(request_id, pooling, prompt=PROMPT):
    return Request(request_id, prompt, GREEDY, pooling=pooling)


def told(events):
    return [one for e in events if isinstance(e, PromptEvent) for one in e.logprobs]


@torch.inference_mode()
def check_against(reference, events, prompt=PROMPT):
    """Compare what was told of a prompt with what transformers computes."""
    ids = torch.tensor([prompt])
    expected = reference(ids).logits[0].log_softmax(-1)
    found = told(events["scored"])
    assert len(found) == len(prompt) - 1
    for position, one in enumerate(found):
        row = expected[position]
        assert one.logprob == pytest.approx(float(row[prompt[position + 1]]), abs=1e-4)
        assert [i for i, _ in one.top] == row.topk(3).indices.tolist()
    states = reference.model(ids).last_hidden_state[0]
    for name, state in (("last", states[-1]), ("mean", states.mean(0))):
        (end,) = events[name]
        assert end.finish_reason is FinishReason.STOP
        torch.testing.assert_close(torch.tensor(end.embedding), state, atol=1e-4, rtol=1e-4)


def test_they_are_those_of_transformers(any_model, reference):
    core = make_core(any_model, max_step_tokens=32)
    wishes = [scored(max_tokens=3), pooled("last", Pooling.LAST), pooled("mean", Pooling.MEAN)]
    events = finish(core, [*wishes, greedy_request("other", PROMPT[5:20])])
    core.close()
    check_against(reference, events)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
def test_a_device_computes_the_same(reference):
    prompt = PROMPT[:12]
    core = make_device_core(transformer_of(reference), max_running=4, max_step_tokens=24)
    wishes = [
        scored(prompt=prompt, max_tokens=2),
        pooled("last", Pooling.LAST, prompt),
        pooled("mean", Pooling.MEAN, prompt),
    ]
    events = finish(core, wishes)
    core.close()
    check_against(reference, events, prompt)


@pytest.fixture
def model(reference):
    return transformer_of(reference)


@pytest.mark.parametrize("max_step_tokens", [32, 37, 256])
def test_neither_chunks_nor_company_show_in_a_bit(model, max_step_tokens):
    wishes = [scored(), pooled("last", Pooling.LAST), pooled("mean", Pooling.MEAN)]
    alone = {}
    for wish in wishes:
        core = make_core(model)
        alone |= finish(core, [wish])
        core.close()
    core = make_core(model, max_step_tokens=max_step_tokens)
    others = [greedy_request(f"other{i}", PROMPT[i : 3 * i + 4]) for i in range(5)]
    together = finish(core, [*others, *wishes])
    core.close()
    assert told(together["scored"]) == told(alone["scored"])
    for name in ("last", "mean"):
        assert together[name][-1].embedding == alone[name][-1].embedding


def test_a_neighbour_that_wants_more_changes_nobodys_tokens(model):
    plain = [greedy_request(f"r{i}", PROMPT[i : 3 * i + 4], ignore_eos=True) for i in range(5)]
    core = make_core(model)
    alone = drive(core, plain)
    together = finish(core, [*plain, scored(), pooled("mean", Pooling.MEAN)])
    core.close()
    for name, tokens in alone.items():
        assert [e.token.token_id for e in together[name]] == tokens


def test_under_memory_pressure_everything_is_told_once(model):
    greedy = PolicyChoice(admission="greedy")
    core = make_core(model, num_pages=8, max_step_tokens=32, max_model_len=64, choice=greedy)
    wishes = [scored(f"s{i}", prompt=PROMPT[: 30 + i], max_tokens=20) for i in range(3)]
    wishes += [pooled(f"m{i}", Pooling.MEAN, PROMPT[: 30 + i]) for i in range(3)]
    events = finish(core, wishes)
    assert core.stats().num_preemptions > 0
    core.close()
    for i in range(3):
        lone = make_core(model)
        alone = finish(lone, [wishes[i], wishes[i + 3]])
        lone.close()
        assert told(events[f"s{i}"]) == told(alone[f"s{i}"])
        assert events[f"m{i}"][0].embedding == alone[f"m{i}"][0].embedding


def test_slices_of_rows_do_not_show(model, monkeypatch):
    core = make_core(model)
    whole = finish(core, [scored()])
    monkeypatch.setattr(prompt_reports, "_SLICE", 7)
    sliced = finish(core, [scored()])
    core.close()
    assert told(sliced["scored"]) == told(whole["scored"])


def test_adapters_of_every_kind_are_respected(tmp_path):
    """Heads, last norms and virtual tokens change what is told, as they change the tokens."""
    reference = tiny_reference(tiny_config(head_dim=HEAD_DIM))
    model = transformer_of(reference)
    core = make_core(model, num_pages=1024)
    base = told(finish(core, [scored()])["scored"])
    kinds = save_kinds(tmp_path, make_adapters(reference))
    num_changed = 0
    for kind in kinds.values():
        adapted = adapt_prompt(kind, PROMPT, model.spec.vocab_size)
        whole = Request(
            "whole",
            adapted.token_ids,
            dataclasses.replace(GREEDY, prompt_logprobs=3),
            adapted.adapter,
            num_virtual=adapted.num_virtual,
            adapter_start=adapted.adapter_start,
        )
        events = finish(core, [whole, scored("base")])
        assert told(events["base"]) == base
        assert len(told(events["whole"])) == len(PROMPT) - 1
        num_changed += told(events["whole"]) != base
        # What a next token would be drawn from, had the prompt ended one token earlier.
        shorter = dataclasses.replace(
            whole,
            prompt_token_ids=whole.prompt_token_ids[:-1],
            sampling=dataclasses.replace(GREEDY, logprobs=3),
        )
        (event,) = finish(core, [shorter])["whole"]
        assert told(events["whole"])[-1].top == event.token.logprobs.top
    core.close()
    assert num_changed == len(kinds) - 2  # the base, and the activated one without its tokens


def test_logits_that_are_not_finite_fail_the_request_alone(model):
    core = make_core(model)
    with torch.inference_mode():
        model._weights.embedding[50] = float("inf")
    poisoned = (*PROMPT[:9], 50, *PROMPT[9:12])
    events = finish(
        core,
        [
            scored(prompt=poisoned),
            pooled("mean", Pooling.MEAN, poisoned),
            greedy_request("fine", (5, 6, 7), max_tokens=2),
        ],
    )
    core.close()
    for name in ("scored", "mean"):
        (end,) = events[name]
        assert (end.finish_reason, end.message) == (FinishReason.FAILED, runner.NOT_FINITE)
    assert events["fine"][-1].finish_reason is not FinishReason.FAILED
