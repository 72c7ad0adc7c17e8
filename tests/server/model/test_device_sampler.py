"""The device sampler gives what the CPU's sampler gives, and reports it only from the host."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from loraplex_scheduler.plan import SequenceStep
from loraplex_server.model.device_copy import copy_to
from loraplex_server.model.device_sampler import DeviceSampler
from loraplex_server.model.sampler import sample
from tests.support.sampling_checks import make_step, random_logits

CPU = torch.device("cpu")
VOCAB = 300


@pytest.fixture
def sampler():
    return DeviceSampler(max_rows=16, device=CPU)


def named(steps: list[SequenceStep]) -> list[SequenceStep]:
    """Give each step a request id of its own."""
    replace = dataclasses.replace
    return [
        replace(step, request=replace(step.request, request_id=f"r{i}"))
        for i, step in enumerate(steps)
    ]


def demanding_steps(seed: int, count: int) -> list[SequenceStep]:
    """Return rows of which most edit their logits or report log probabilities."""
    rng = random.Random(seed)
    steps = []
    for _ in range(count):
        history = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40)))
        step = make_step(
            seed=rng.randrange(2**64),
            position=rng.randrange(1000),
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.8]),
            logit_bias={rng.randrange(VOCAB): 5.0} if rng.random() < 0.4 else {},
            logprobs=rng.choice([None, 0, 3, 20]),
        )
        banned = frozenset(rng.sample(range(VOCAB), rng.choice([0, 3])))
        prompt = history[: rng.randrange(len(history))]
        request = dataclasses.replace(step.request, prompt_token_ids=prompt)
        steps.append(
            dataclasses.replace(step, request=request, history=history, banned_token_ids=banned)
        )
    return named(steps)


def test_rows_with_edits_and_logprobs_get_what_the_sampler_gives(sampler):
    steps = demanding_steps(0, 14)
    logits = random_logits(0, 14, VOCAB)
    result = sampler.sample(logits, steps).to_host().result("broken")
    expected = dict(zip([s.request_id for s in steps], sample(logits, steps), strict=True))
    assert result.tokens == expected
    assert result.failures == {}


def test_fill_launch_collect_is_the_same_choice(sampler):
    options = [{"temperature": 0.0}, {"top_p": 0.8, "seed": 3}, {"top_k": 5, "seed": 4}]
    steps = named([make_step(**kwargs) for kwargs in options])
    assert sampler.is_plain(steps)
    logits = random_logits(1, 8, VOCAB)  # a captured launch has rows that nobody uses
    sampler.fill(steps)
    sampler.launch(logits)
    sampled = sampler.collect(steps)
    assert sampled.tokens.tolist() == [t.token_id for t in sample(logits[:3], steps)]
    assert sampled.to_host().result("broken").tokens.keys() == {"r0", "r1", "r2"}


def test_rows_without_a_sequence_forget_the_parameters_of_earlier_steps(sampler):
    sampler.fill([make_step(temperature=5.0, seed=i) for i in range(16)])
    sampler.fill([make_step(temperature=5.0)])
    logits = random_logits(2, 16, VOCAB)
    sampler.launch(logits)
    padding = sampler.collect([make_step()] * 16).tokens[1:]
    assert torch.equal(padding, logits[1:].argmax(-1))


def test_a_launch_writes_to_the_same_memory_again(sampler):
    """So that a graph may hold it, and the next step may read tokens without the host."""
    first = sampler.sample(random_logits(3, 2, VOCAB), [make_step(temperature=0.0)] * 2)
    kept = first.to_host().outcome
    second = sampler.sample(random_logits(4, 2, VOCAB), [make_step(temperature=0.0)] * 2)
    assert first.outcome.data_ptr() == second.outcome.data_ptr()
    assert not torch.equal(first.outcome, kept)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"logprobs": 2}], ids=str)
def test_rows_that_are_not_finite_fail_alone(sampler, options):
    steps = named([make_step(seed=i, **options) for i in range(4)])
    steps[0] = dataclasses.replace(steps[0], banned_token_ids=frozenset({7}))
    logits = random_logits(5, 4, VOCAB)
    healthy = sampler.sample(logits, steps).to_host().result("broken")
    logits[1] = float("nan")
    logits[2, 7] = float("inf")
    result = sampler.sample(logits, steps).to_host().result("broken")
    assert result.failures == {"r1": "broken", "r2": "broken"}
    assert result.tokens == {i: healthy.tokens[i] for i in ("r0", "r3")}


def test_a_row_fails_for_its_logits_even_where_they_are_banned(sampler):
    steps = [dataclasses.replace(make_step(), banned_token_ids=frozenset({7}))]
    logits = random_logits(6, 1, VOCAB)
    logits[0, 7] = float("nan")
    assert sampler.sample(logits, steps).to_host().result("broken").failures == {"r": "broken"}


def test_no_rows_give_no_tokens(sampler):
    result = sampler.sample(torch.empty(0, VOCAB), []).to_host().result("broken")
    assert (result.tokens, result.failures) == ({}, {})


def test_only_rows_that_a_launch_alone_can_serve_are_plain(sampler):
    plain = [make_step(temperature=0.0), make_step(top_k=3, top_p=0.5, min_p=0.1)]
    assert sampler.is_plain(plain)
    others = [
        make_step(logprobs=0),
        make_step(logit_bias={1: 1.0}),
        make_step(presence_penalty=1.0),
        dataclasses.replace(make_step(), banned_token_ids=frozenset({1})),
    ]
    assert not any(sampler.is_plain([*plain, other]) for other in others)


def test_a_table_for_the_cpu_is_not_copied():
    table = torch.arange(3)
    assert copy_to(CPU, table) is table
