"""Sampling against per-row formulas written out plainly, and independence of the company."""

from __future__ import annotations

import math
import random

import pytest
import torch

from loraplex_scheduler.plan import Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.model.draw import filtered_probs, uniforms
from loraplex_server.model.logit_edits import edit_logits
from loraplex_server.model.sampler import sample
from loraplex_server.model.token_masks import mask_rows

VOCAB = 300


def make_step(*, history=(), num_prompt=0, position=7, banned=(), **sampling) -> SequenceStep:
    return SequenceStep(
        request=Request("r", tuple(history)[:num_prompt], SamplingParams(**sampling)),
        start=position - 1,
        num_tokens=1,
        token_ids=(1,),
        block_table=(0,),
        is_sampled=True,
        history=tuple(history),
        banned_token_ids=frozenset(banned),
    )


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.manual_seed(seed)) * 3


def draw_counts(logits: torch.Tensor, draws: int, **sampling) -> torch.Tensor:
    """Count the tokens of one distribution over `draws` positions."""
    steps = [make_step(position=i, **sampling) for i in range(draws)]
    tokens = sample(logits.expand(draws, -1), steps)
    return torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=logits.shape[1])


# Greedy


def test_greedy_is_the_argmax_and_the_lowest_id_of_equals():
    logits = torch.zeros(2, VOCAB)
    logits[1, [9, 40, 200]] = 3.0
    tokens = sample(logits, [make_step(temperature=0)] * 2)
    assert [t.token_id for t in tokens] == [0, 9]
    assert tokens[0].logprobs is None


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, VOCAB), []) == []


def test_the_logits_given_are_not_changed():
    logits = random_logits(0, rows=2)
    before = logits.clone()
    steps = [make_step(temperature=0, banned={1}), make_step(top_k=5, logit_bias={2: 5.0})]
    sample(logits, steps)
    assert torch.equal(logits, before)


def test_a_tiny_temperature_chooses_the_argmax():
    logits = random_logits(1, rows=8) * 100
    steps = [make_step(temperature=10.0**-exponent, seed=3) for exponent in (4, 6, 9, 30, 45, 300)]
    tokens = [t.token_id for t in sample(logits[:6], steps)]
    assert tokens == logits[:6].argmax(-1).tolist()


# Edits


def test_edits_follow_their_formulas_in_order():
    rng = random.Random(0)
    logits = random_logits(2, rows=20)
    steps = []
    for _ in range(20):
        history = [rng.randrange(40) for _ in range(30)]
        steps.append(
            make_step(
                history=history,
                num_prompt=rng.randrange(31),
                banned=rng.sample(range(VOCAB), 3),
                logit_bias={rng.randrange(40): rng.uniform(-9, 9) for _ in range(4)},
                repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
                presence_penalty=rng.choice([0.0, 0.7, -1.0]),
                frequency_penalty=rng.choice([0.0, 0.4]),
            )
        )
    edited = edit_logits(logits, steps, mask_rows(steps, logits.shape[1]))
    for row, step in enumerate(steps):
        expected = plain_edit(logits[row].tolist(), step)
        torch.testing.assert_close(edited[row], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def plain_edit(logits: list[float], step: SequenceStep) -> list[float]:
    p = step.sampling
    for token in step.banned_token_ids:
        logits[token] = -math.inf
    for token, bias in p.logit_bias.items():
        logits[token] += bias
    if not p.has_penalties:
        return logits
    for token in set(step.history):
        scale = p.repetition_penalty
        logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
    output = step.history[step.num_prompt :]
    for token in set(output):
        logits[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    return logits


def test_rows_without_edits_are_passed_through_uncopied():
    logits = random_logits(0, rows=2)
    steps = [make_step(), make_step(top_k=3)]
    assert edit_logits(logits, steps, mask_rows(steps, VOCAB)) is logits


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(1, VOCAB)
    step = make_step(history=(5, 5, 6, 6, 7), num_prompt=2, frequency_penalty=0.5)
    edited = edit_logits(logits, [step], mask_rows([step], VOCAB))[0]
    assert edited[[5, 6, 7, 8]].tolist() == [0.0, -1.0, -0.5, 0.0]


def test_banned_tokens_are_never_chosen_whatever_their_bias():
    logits = random_logits(3)
    best = int(logits.argmax())
    steps = [
        make_step(temperature=0, banned={best}, logit_bias={best: 100.0}),
        make_step(temperature=5, banned=set(range(1, VOCAB))),
    ]
    tokens = sample(logits.expand(2, -1), steps)
    assert tokens[0].token_id != best
    assert tokens[1].token_id == 0


def test_bias_of_100_selects_a_token():
    assert sample(random_logits(4), [make_step(logit_bias={17: 100.0})])[0].token_id == 17


# Filters


def plain_probs(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Temperature, top-k, top-p, min-p one after the other, renormalising; no equal values."""
    probs = (logits.double() / p.temperature).softmax(-1)
    order = probs.argsort(descending=True).tolist()
    kept = order[: p.top_k] if p.top_k else order
    total = sum(float(probs[t]) for t in kept)
    before, nucleus = 0.0, []
    for token in kept:
        if before < p.top_p:
            nucleus.append(token)
        before += float(probs[token]) / total
    final = [t for t in nucleus if probs[t] >= p.min_p * probs[order[0]]]
    result = torch.zeros_like(probs)
    result[final] = probs[final]
    return result / result.sum()


FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.3, "top_p": 0.9},
]


@pytest.mark.parametrize("vocab", [VOCAB, 5000])
def test_filters_follow_their_definitions_in_one_batch(vocab):
    """The larger vocabulary has nuclei beyond each stage of the search for them."""
    logits = random_logits(5, rows=len(FILTERS), vocab=vocab) * (0.2 if vocab > VOCAB else 1.0)
    params = [SamplingParams(**options) for options in FILTERS]
    probs = filtered_probs(logits, params)
    for row, p in enumerate(params):
        ours = probs[row].double() / probs[row].double().sum()
        torch.testing.assert_close(ours, plain_probs(logits[row], p), atol=1e-6, rtol=1e-4)


def test_equal_probabilities_are_kept_together():
    logits = torch.zeros(3, VOCAB)
    logits[:, :4] = 5.0
    params = [SamplingParams(top_k=2), SamplingParams(top_p=0.1), SamplingParams(min_p=1.0)]
    assert (filtered_probs(logits, params) > 0).sum(-1).tolist() == [4, 4, 4]


# Draws


def test_draws_follow_the_distribution():
    logits = random_logits(6, vocab=30)
    counts = draw_counts(logits, 20_000, seed=11)
    assert_distribution(counts, logits.double().softmax(-1)[0])


def test_draws_over_seeds_follow_the_distribution():
    logits = random_logits(7, vocab=30)
    steps = [make_step(seed=seed, position=3, temperature=1.3) for seed in range(20_000)]
    tokens = sample(logits.expand(len(steps), -1), steps)
    counts = torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=30)
    assert_distribution(counts, (logits.double() / 1.3).softmax(-1)[0])


def assert_distribution(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square over cells of at least five expected draws, loose: 5 deviations of its mean."""
    expected = probs * counts.sum()
    cells = expected >= 5
    statistic = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_uniforms_are_a_function_of_seed_and_position():
    draws = uniforms([0, 0, 1, 2**64 - 1, -1], [0, 1, 0, 5, 5])
    assert ((draws >= 0) & (draws < 1)).all()
    assert len(set(draws[:4])) == 4
    assert draws[3] == draws[4]
    assert draws.tolist() == uniforms([0, 0, 1, -1, -1], [0, 1, 0, 5, 5]).tolist()


def test_uniforms_are_splitmix64_of_the_mixed_seed():
    """Fixed for good: a seed must give the same text after an upgrade."""
    first_output_of_state_0 = 0xE220A8397B1DCDAF
    assert uniforms([0], [0])[0] == (first_output_of_state_0 >> 12) / 2**52
    assert uniforms([42], [1000])[0] == plain_uniform(42, 1000)


def plain_uniform(seed: int, position: int) -> float:
    state = mix64(seed) + (position + 1) * 0x9E3779B97F4A7C15
    return (mix64(state % 2**64) >> 12) / 2**52


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_only_kept_tokens_are_drawn():
    logits = random_logits(8)
    allowed = set(logits[0].topk(5).indices.tolist())
    counts = draw_counts(logits, 500, top_k=5, temperature=3.0)
    assert set(counts.nonzero().flatten().tolist()) <= allowed


# Company


def random_step(rng: random.Random) -> SequenceStep:
    history = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 50))]
    return make_step(
        history=history,
        num_prompt=rng.randrange(len(history)),
        position=rng.randrange(1000),
        banned=rng.sample(range(VOCAB), rng.choice([0, 0, 2])),
        seed=rng.randrange(2**64),
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 3, 50]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.02]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias={rng.randrange(VOCAB): 4.0} if rng.random() < 0.3 else {},
        logprobs=rng.choice([None, 0, 5, 20]),
    )


def test_a_row_alone_gives_what_it_gives_in_company():
    rng = random.Random(0)
    for trial in range(40):
        count = rng.randrange(2, 12)
        logits = random_logits(100 + trial, rows=count)
        steps = [random_step(rng) for _ in range(count)]
        together = sample(logits, steps)
        for row in range(count):
            assert sample(logits[row : row + 1], [steps[row]]) == [together[row]]


def test_distributions_are_bit_identical_in_company():
    rng = random.Random(1)
    logits = random_logits(9, rows=16, vocab=3001)
    params = [random_step(rng).sampling for _ in range(16)]
    params = [p for p in params if not p.is_greedy]
    together = filtered_probs(logits[: len(params)], params)
    for row, p in enumerate(params):
        assert torch.equal(filtered_probs(logits[row : row + 1], [p])[0], together[row])


def test_a_broken_row_gets_a_valid_token_and_harms_nobody():
    logits = random_logits(10, rows=4)
    steps = [make_step(seed=i, top_p=0.9) for i in range(3)] + [make_step(temperature=0)]
    healthy = sample(logits, steps)
    logits[1], logits[3] = float("nan"), float("inf")
    broken = sample(logits, steps)
    assert [broken[0], broken[2]] == [healthy[0], healthy[2]]
    assert all(0 <= token.token_id < VOCAB for token in broken)


# Log probabilities


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(11)
    step = make_step(
        temperature=0, logprobs=3, logit_bias={17: 100.0}, history=(4,), repetition_penalty=2.0
    )
    token = sample(logits, [step])[0]
    expected = logits[0].log_softmax(-1)
    assert token.token_id == 17
    assert token.logprobs.logprob == pytest.approx(float(expected[17]), abs=1e-6)
    values, ids = expected.topk(3)
    assert [i for i, _ in token.logprobs.top] == ids.tolist()
    assert [v for _, v in token.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_only_rows_that_ask_get_logprobs():
    steps = [make_step(), make_step(logprobs=0), make_step(logprobs=20)]
    tokens = sample(random_logits(12, rows=3), steps)
    assert tokens[0].logprobs is None
    assert tokens[1].logprobs.top == ()
    assert len(tokens[2].logprobs.top) == 20


def test_a_vocabulary_smaller_than_the_logprobs_asked_for_is_listed_whole():
    token = sample(random_logits(13, vocab=6), [make_step(logprobs=20)])[0]
    assert len(token.logprobs.top) == 6


# What may not be chosen


def choose(logits: torch.Tensor, **options) -> int:
    (token,) = sample(logits, [make_step(temperature=0, **options)])
    return token.token_id


def test_only_allowed_tokens_are_chosen_and_logprobs_stay_those_of_the_model():
    logits = torch.arange(float(VOCAB))[None]
    (token,) = sample(
        logits, [make_step(temperature=0, allowed_token_ids=frozenset({3, 8}), logprobs=1)]
    )
    assert token.token_id == 8
    assert token.logprobs.top[0][0] == VOCAB - 1


def test_drawn_rows_keep_to_what_is_allowed_too():
    counts = draw_counts(random_logits(1), 200, allowed_token_ids=frozenset({3, 8}))
    assert counts[3] + counts[8] == 200
    assert counts[3] > 0
    assert counts[8] > 0


def test_a_bad_word_is_not_completed_and_may_begin():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 2.0
    logits[0, 9] = 1.0
    words = ((4, 5, 7), (11,))
    assert choose(logits, bad_words=words, history=(4, 5), num_prompt=0) == 9
    assert choose(logits, bad_words=words, history=(5, 5), num_prompt=0) == 7
    assert choose(logits, bad_words=words, history=(5,), num_prompt=0) == 7
    # The prompt is not what the model says.
    assert choose(logits, bad_words=words, history=(4, 5), num_prompt=1) == 7
    logits[0, 11] = 3.0
    assert choose(logits, bad_words=words) == 7


def test_neighbours_of_a_masked_row_are_as_they_were():
    logits = random_logits(2, rows=3)
    plain = [make_step(temperature=0), make_step(), make_step(temperature=0)]
    masked = [plain[0], plain[1], make_step(temperature=0, allowed_token_ids=frozenset({5}))]
    assert sample(logits, masked)[:2] == sample(logits, plain)[:2]
    assert sample(logits, masked)[2].token_id == 5


def test_a_row_that_may_choose_nothing_says_why():
    row = make_step(allowed_token_ids=frozenset({3}), banned={3})
    masks = mask_rows([make_step(), row], VOCAB)
    assert list(masks.failures) == [1]
    assert "`allowed_token_ids` and `min_tokens`" in masks.failures[1]
