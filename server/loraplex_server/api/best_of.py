"""Choosing among more samples than were asked for."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex_server.api.answer import Written
from loraplex_server.api.logprobs import shown_logprob


def best_samples(sequences: Sequence[Written], *, num_drawn: int, num_kept: int) -> list[Written]:
    """Return the best `num_kept` of each prompt's `num_drawn` samples, best first.

    The best is the one with the highest mean log probability of its tokens: a sum would favour
    short answers. Equal ones stay in their order.
    """
    kept: list[Written] = []
    for start in range(0, len(sequences), num_drawn):
        samples = sequences[start : start + num_drawn]
        kept += sorted(samples, key=mean_logprob, reverse=True)[:num_kept]
    return kept


def mean_logprob(written: Written) -> float:
    """Return the mean log probability of a sequence's tokens, which were asked for."""
    known = [shown_logprob(token.logprobs.logprob) for token in written.tokens if token.logprobs]
    return sum(known) / len(known) if known else float("-inf")
