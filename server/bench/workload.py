"""The requests of a closed-loop run: the same for every arm, from one seed."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: Prompts of random ids share no prefix; the range avoids special tokens.
TOKEN_IDS = range(1000, 40000)


@dataclass(frozen=True)
class Work:
    """One request: random prompt, exact output length. `adapter` indexes the run's adapters."""

    adapter: int | None
    prompt: tuple[int, ...]
    num_output: int


@dataclass(frozen=True)
class Timing:
    """What a client saw of one request; seconds from its submission."""

    num_output: int
    token_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.token_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


def make_work(num_requests: int, num_adapters: int, seed: int) -> list[Work]:
    """Draw prompts of 8 to 128 tokens and outputs of 8 to 64; adapters take turns.

    Taking turns makes any 32 requests in a row use 32 distinct adapters: the hardest mix. Lengths
    and prompts depend on the seed alone, so arms with other adapters do the same work.
    """
    rng = random.Random(seed)
    work = []
    for i in range(num_requests):
        prompt = tuple(rng.choices(TOKEN_IDS, k=rng.randint(8, 128)))
        num_output = rng.randint(8, 64)
        work.append(Work(i % num_adapters if num_adapters else None, prompt, num_output))
    return work


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def summarize(timings: Sequence[Timing], wall_s: float) -> dict[str, float]:
    """Return rates (tokens per second) and latencies (milliseconds) of one run."""
    gaps = [gap for t in timings for gap in t.gaps_s]
    ttfts = [t.ttft_s for t in timings]
    return {
        "out_tok_s": sum(t.num_output for t in timings) / wall_s,
        "ttft_p50_ms": 1e3 * statistics.median(ttfts),
        "ttft_p99_ms": 1e3 * percentile(ttfts, 99),
        "itl_p50_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * percentile(gaps, 99),
    }
