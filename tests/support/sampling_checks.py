"""Checks of the sampling kernel against the server's own sampler, on any device.

The kernel's weights differ from `draw.py`'s in their last bits, so at a uniform number within
`TOLERANCE` of the border between two tokens either is right. Anything else is a fault.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import torch

from loraplex_kernels.sampling_triton import SamplingScratch, sample_rows
from loraplex_scheduler.plan import Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.model.draw import filtered_probs, uniforms
from loraplex_server.model.sampler import sample

TOLERANCE = 1e-6

#: Smaller than what is served, so that short rows have several blocks too.
BLOCK = 512


def make_step(*, position: int = 7, request_id: str = "r", **sampling) -> SequenceStep:
    return SequenceStep(
        request=Request(request_id, (), SamplingParams(**sampling)),
        start=position - 1,
        num_tokens=1,
        token_ids=(1,),
        block_table=(0,),
        is_sampled=True,
    )


def random_steps(rng: random.Random, count: int) -> list[SequenceStep]:
    """Return greedy and drawn rows with any mix of filters, extreme ones among them."""
    return [
        make_step(
            position=rng.randrange(1000),
            seed=rng.randrange(2**64),
            temperature=rng.choice([0.0, 0.5, 1.0, 1.0, 1.7, 1e-6, 100.0]),
            top_k=rng.choice([0, 0, 1, 3, 50, 100_000]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.3, 1e-6, 0.999999]),
            min_p=rng.choice([0.0, 0.0, 0.02, 1.0]),
        )
        for _ in range(count)
    ]


def run(
    logits: torch.Tensor,
    steps: Sequence[SequenceStep],
    *,
    capacity: int = 64,
    block: int = BLOCK,
) -> torch.Tensor:
    """Return the kernel's outcome, int64 `[2, S]`, on the CPU."""
    params = [step.sampling for step in steps]
    uniform = uniforms([p.seed for p in params], [step.position for step in steps])
    fields = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]
    table = torch.tensor(
        [(*row, u) for row, u in zip(fields, uniform, strict=True)], dtype=torch.float64
    )
    outcome = torch.full((2, len(steps)), -7, device=logits.device)
    scratch = SamplingScratch(len(steps), logits.device, capacity)
    table = table.T.clone(memory_format=torch.contiguous_format).to(logits.device)
    sample_rows(logits, table, outcome, scratch, block=block)
    return outcome.cpu()


def assert_same_tokens(logits: torch.Tensor, steps: Sequence[SequenceStep], **options) -> None:
    """Compare with `sample`; on a CPU every token, on a GPU all but those at a border."""
    tokens, is_finite = run(logits, steps, **options)
    assert is_finite.tolist() == [1] * len(steps)
    host = logits.cpu()
    expected = [token.token_id for token in sample(host, steps)]
    differing = [i for i, token in enumerate(tokens.tolist()) if token != expected[i]]
    faults = [i for i in differing if not is_at_border(host[i], steps[i], int(tokens[i]))]
    assert not faults, [(tokens[i], expected[i], steps[i].sampling) for i in faults]
    assert len(differing) <= (0 if logits.device.type == "cpu" else max(1, len(steps) // 50))


def is_at_border(logits: torch.Tensor, step: SequenceStep, token: int) -> bool:
    """Whether `token` is right for a uniform number or a filter that is `TOLERANCE` away."""
    uniform = uniforms([step.sampling.seed], [step.position])[0]
    for sign in (0, -1, 1):
        params = dataclasses.replace(
            step.sampling,
            top_p=min(1.0, step.sampling.top_p * (1 + sign * TOLERANCE)),
            min_p=min(1.0, step.sampling.min_p * (1 + sign * TOLERANCE)),
        )
        probs = filtered_probs(logits[None], [params])[0].double()
        cumulative = probs.cumsum(0) / probs.sum()
        low = float(cumulative[token] - probs[token] / probs.sum())
        if probs[token] > 0 and low - TOLERANCE <= uniform <= cumulative[token] + TOLERANCE:
            return True
    return False


def random_logits(seed: int, rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


# ---- greedy rows and flags -----------------------------------------------------------------


def greedy_rows_take_the_lowest_id_of_equals(device: torch.device) -> None:
    for vocab in (1, 3, 300, 4097):
        logits = random_logits(vocab, 3, vocab)
        logits[1] = logits[1].round()
        logits[2] = -1.0
        best = {0: 0, 1: min(9, vocab - 1), 2: vocab // 2}[vocab % 3]
        logits[2, best:] = 4.5
        tokens = run(logits.to(device), [make_step(temperature=0.0)] * 3)[0].tolist()
        expected = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert tokens == expected


def rows_that_are_not_finite_are_flagged_and_harm_nobody(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    for greedy in (True, False):
        options = {"temperature": 0.0} if greedy else {"top_p": 0.9, "top_k": 20}
        steps = [make_step(seed=i, **options) for i in range(6)]
        logits = random_logits(1, 6, 700)
        healthy = run(logits.to(device), steps)
        logits[0] = nan
        logits[1, 650] = nan
        logits[2, 3] = inf
        logits[3] = -inf
        logits[4, [1, 500]] = -inf  # some tokens that cannot be chosen are no fault
        tokens, is_finite = run(logits.to(device), steps)
        assert is_finite.tolist() == [0, 0, 0, 0, 1, 1]
        assert all(0 <= token < 700 for token in tokens.tolist())
        assert tokens[5] == healthy[0, 5]
        assert int(tokens[4]) not in (1, 500)


def no_rows_launch_nothing(device: torch.device) -> None:
    logits = torch.empty(0, 300, device=device)
    table = torch.empty(5, 4, dtype=torch.float64, device=device)
    outcome = torch.full((2, 4), -7, device=device)
    sample_rows(logits, table, outcome, SamplingScratch(4, device))
    assert (outcome == -7).all()


# ---- drawn rows against the server's sampler -----------------------------------------------


def any_mix_of_rows_draws_what_the_sampler_draws(device: torch.device) -> None:
    for seed, (vocab, rows) in enumerate([(300, 16), (999, 8), (2500, 4)]):
        steps = random_steps(random.Random(seed), rows)
        assert_same_tokens(random_logits(seed, rows, vocab).to(device), steps)


def equal_logits_are_kept_together(device: torch.device) -> None:
    steps = random_steps(random.Random(5), 16)
    assert_same_tokens(random_logits(5, 16, 500).round().to(device), steps)
    flat = torch.zeros(6, 500)
    flat[:, 100:400] = 7.0
    options = [{"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 301}, {"top_k": 300}, {}]
    steps = [make_step(seed=i, **kwargs) for i, kwargs in enumerate(options)]
    assert_same_tokens(flat.to(device), steps)


def each_filter_alone_agrees_over_seeds(device: torch.device) -> None:
    filters = [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.05, "top_k": 90},
        {"temperature": 1e-300, "top_p": 0.9},
    ]
    steps = [make_step(seed=seed, **options) for seed in range(2) for options in filters]
    assert_same_tokens(random_logits(6, len(steps), 400).to(device), steps)


def logits_of_any_size_are_told_apart(device: torch.device) -> None:
    """Nothing depends on where logits lie: far from 0, close together, or -inf for the most."""
    steps = random_steps(random.Random(7), 8)
    for scale, shift in ((1e-3, 0.0), (1e-3, -50.0), (300.0, 1e4)):
        assert_same_tokens((random_logits(8, 8, 300) * scale + shift).to(device), steps)
    sparse = torch.full((8, 300), float("-inf"))
    sparse[:, ::37] = random_logits(9, 8, 9)
    assert_same_tokens(sparse.to(device), steps)


def rows_that_keep_more_than_is_moved_are_right(device: torch.device) -> None:
    """Capacities below, at and above what the filters keep: below, the row itself is read."""
    options = [{"top_k": 60}, {"top_p": 0.95}, {"temperature": 2.0, "top_k": 64, "top_p": 0.9}]
    steps = [make_step(seed=i, **options[i % 3]) for i in range(6)]
    logits = random_logits(10, 6, 300).to(device)
    for capacity in (4, 60, 64):
        assert_same_tokens(logits, steps, capacity=capacity, block=128)


def rows_may_lie_anywhere(device: torch.device) -> None:
    """Rows of a wider tensor, from an address that is no multiple of 16, of an odd length."""
    wide = random_logits(11, 8, 513).to(device)
    steps = random_steps(random.Random(11), 8)
    assert_same_tokens(wide[:, 1:512], steps)
    assert_same_tokens(wide[:, :512], steps)
    assert torch.equal(wide.cpu(), random_logits(11, 8, 513))


def the_serving_block_agrees(device: torch.device) -> None:
    """The sizes that serving launches, at a real vocabulary where that is fast."""
    vocab, rows = (49152, 64) if device.type != "cpu" else (5003, 6)
    steps = random_steps(random.Random(12), rows)
    logits = random_logits(12, rows, vocab).to(device)
    assert_same_tokens(logits, steps, capacity=4096, block=2048)


# ---- distribution and company --------------------------------------------------------------


def draws_follow_the_distribution(device: torch.device) -> None:
    """Chi-square over cells of at least five expected draws; 5 deviations from its mean."""
    draws = 20_000 if device.type != "cpu" else 120
    logits = random_logits(13, 1, 6) / 3
    steps = [make_step(position=i, seed=11, temperature=1.3) for i in range(draws)]
    tokens = run(logits.expand(draws, -1).contiguous().to(device), steps, capacity=4, block=16)[0]
    expected = (logits.double() / 1.3).softmax(-1)[0] * draws
    counts = torch.bincount(tokens, minlength=6)
    cells = expected >= 5
    statistic = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def a_row_alone_gives_what_it_gives_in_company(device: torch.device) -> None:
    steps = random_steps(random.Random(14), 10)
    logits = random_logits(14, 10, 700).to(device)
    together = run(logits, steps)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = run(logits[order.to(device)], [steps[i] for i in order.tolist()])
    assert torch.equal(shuffled, together[:, order])
    for row in range(0, 10, 4):
        alone = run(logits[row : row + 1], [steps[row]])
        assert torch.equal(alone, together[:, row : row + 1])


SAMPLING_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    (check.__name__, check)
    for check in (
        greedy_rows_take_the_lowest_id_of_equals,
        rows_that_are_not_finite_are_flagged_and_harm_nobody,
        no_rows_launch_nothing,
        any_mix_of_rows_draws_what_the_sampler_draws,
        equal_logits_are_kept_together,
        each_filter_alone_agrees_over_seeds,
        logits_of_any_size_are_told_apart,
        rows_that_keep_more_than_is_moved_are_right,
        rows_may_lie_anywhere,
        the_serving_block_agrees,
        draws_follow_the_distribution,
        a_row_alone_gives_what_it_gives_in_company,
    )
]
