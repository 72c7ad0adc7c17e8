"""The requests of a closed-loop run: the same for every arm, from one seed."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    def latency_s(self) -> float:
        return self.token_s[-1]

    @property
    def tpot_s(self) -> float:
        """Mean seconds of a token after the first; one arrival may bring several tokens."""
        return (self.token_s[-1] - self.token_s[0]) / max(1, self.num_output - 1)

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


def make_skewed_work(
    num_requests: int,
    num_adapters: int,
    seed: int,
    *,
    alpha: float = 1.0,
    zipf: float | None = None,
    num_prompt: tuple[int, int] = (8, 128),
    num_output: tuple[int, int] = (8, 64),
    ids_salt: str = "",
) -> list[Work]:
    """Draw the synthetic workload of S-LoRA (section 7.2): adapters by a power law.

    Adapter i of n gets the share ((i + 1) / n) ** alpha - (i / n) ** alpha of the requests: 1 is
    uniform, less is more skewed. Lengths are uniform and ids random. Each quantity has its own
    stream, so lengths and prompts of a seed are the same for any adapters, and fewer requests are
    the beginning of more.

    Args:
        zipf: instead of alpha: weights (rank + 1) ** -zipf, ranks shuffled once, so that how
            popular an adapter is says nothing about its LoRA rank.
        num_prompt, num_output: the least and the most tokens.
        ids_salt: other salts give other prompts of the same lengths.
    """
    streams = ("adapter", "length", "ids" + ids_salt)
    adapters, lengths, ids = (random.Random(f"{seed}/{name}") for name in streams)
    draw = _popularity(num_adapters, alpha, zipf) if num_adapters else None
    work = []
    for _ in range(num_requests):
        adapter = draw(adapters) if draw else None
        prompt_len, output_len = lengths.randint(*num_prompt), lengths.randint(*num_output)
        prompt = tuple(ids.randrange(TOKEN_IDS.start, TOKEN_IDS.stop) for _ in range(prompt_len))
        work.append(Work(adapter, prompt, output_len))
    return work


def _popularity(
    num_adapters: int, alpha: float, zipf: float | None
) -> Callable[[random.Random], int]:
    """Return what draws an adapter's index."""
    if zipf is None:
        # The share of the first i of n is (i / n) ** alpha; this is its inverse. The first draw is
        # for a share of requests to the base model, of which there is none here.
        def power_law(rng: random.Random) -> int:
            rng.random()
            return min(num_adapters - 1, int(num_adapters * rng.random() ** (1 / alpha)))

        return power_law
    order = random.Random(0).sample(range(num_adapters), num_adapters)
    cumulative = list(accumulate((i + 1) ** -zipf for i in range(num_adapters)))
    return lambda rng: rng.choices(order, cum_weights=cumulative)[0]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def summarize(timings: Sequence[Timing], wall_s: float) -> dict[str, float]:
    """Return rates (tokens per second) and times of one run; keys name the units."""
    gaps = [gap for t in timings for gap in t.gaps_s] or [0.0]
    ttfts = [t.ttft_s for t in timings]
    latencies = [t.latency_s for t in timings]
    return {
        "out_tok_s": sum(t.num_output for t in timings) / wall_s,
        "latency_mean_s": statistics.fmean(latencies),
        "latency_p50_s": statistics.median(latencies),
        "latency_p99_s": percentile(latencies, 99),
        "tpot_p50_ms": 1e3 * statistics.median(t.tpot_s for t in timings),
        "ttft_p50_ms": 1e3 * statistics.median(ttfts),
        "ttft_p99_ms": 1e3 * percentile(ttfts, 99),
        "itl_p50_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * percentile(gaps, 99),
    }
