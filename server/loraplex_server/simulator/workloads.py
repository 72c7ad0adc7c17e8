"""Workload generators: the published ones, as described, and ours. Every one is seeded.

S-LoRA's own generator draws from one legacy NumPy stream, and the order of its draws is part of
the workload: with the same seed `slora_trace` gives its very numbers. The others use NumPy's
current generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraplex_server.simulator.trace import NOBODY, Floats, Ints, Trace

#: Half-open bounds of uniformly drawn lengths, S-LoRA's default.
DEFAULT_RANGE = (8, 512)


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths: median, sigma of the logarithm, and bounds that they are clipped to."""

    median: float
    sigma: float
    least: int = 1
    most: int = 4096

    def draw(self, rng: np.random.Generator, num: int) -> Ints:
        drawn = rng.lognormal(math.log(self.median), self.sigma, num)
        return np.clip(np.rint(drawn), self.least, self.most).astype(np.int64)


def slora_trace(
    *,
    num_adapters: int,
    rate: float,
    duration_s: float,
    alpha: float = 1.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = DEFAULT_RANGE,
    output_range: tuple[int, int] = DEFAULT_RANGE,
    seed: int = 42,
) -> Trace:
    """Return S-LoRA's synthetic workload, number for number (0 adapters: the base model alone).

    One MT19937 stream; in this order all adapters, input lengths, output lengths, gaps.
    Adapter = floor(n U^(1/alpha)); gaps are Gamma(1/cv^2, scale cv^2/rate); the first request comes
    after the first gap.
    """
    num = int(rate * duration_s)
    stream = np.random.RandomState(seed)
    drawn = stream.rand(num) ** (1 / alpha)
    adapter = np.floor(max(1, num_adapters) * drawn).astype(np.int64)
    prompt_len = stream.randint(*input_range, num)
    output_len = stream.randint(*output_range, num)
    gaps = stream.gamma(1 / cv**2, cv**2 / rate, num)
    return Trace(
        name=f"slora n={num_adapters} R={rate:g} alpha={alpha:g} cv={cv:g}",
        arrival_s=np.cumsum(gaps),
        adapter=adapter if num_adapters else np.full(num, NOBODY, np.int64),
        prompt_len=prompt_len.astype(np.int64),
        output_len=output_len.astype(np.int64),
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
    )


def per_adapter_trace(
    *,
    num_adapters: int,
    rate: float,
    duration_s: float,
    zipf_s: float = 1.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = DEFAULT_RANGE,
    output_range: tuple[int, int] = DEFAULT_RANGE,
    seed: int = 42,
) -> Trace:
    """Return the workload as S-LoRA's paper defines it: a Gamma renewal process per adapter.

    Adapter i has the rate `rate i^-s / sum_j j^-s`, and its gaps the coefficient of variation
    `cv`; a process starts at a moment of its own, so that rare adapters do not all start at once:
    its gaps begin one mean gap times U(0, 1) before the trace.
    """
    rng = np.random.default_rng(seed)
    rates = rate * zipf_shares(num_adapters, zipf_s)
    arrivals, adapters = [], []
    for adapter, own_rate in enumerate(rates):
        times = _renewals(rng, own_rate, duration_s, cv)
        arrivals.append(times)
        adapters.append(np.full(len(times), adapter, np.int64))
    arrival_s, adapter_of = np.concatenate(arrivals), np.concatenate(adapters)
    order = np.argsort(arrival_s, kind="stable")
    num = len(order)
    return Trace(
        name=f"per-adapter n={num_adapters} R={rate:g} zipf={zipf_s:g} cv={cv:g}",
        arrival_s=arrival_s[order],
        adapter=adapter_of[order],
        prompt_len=rng.integers(*input_range, num),
        output_len=rng.integers(*output_range, num),
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
    )


def zipf_trace(
    *,
    num_adapters: int,
    rate: float,
    duration_s: float,
    zipf_s: float = 1.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = DEFAULT_RANGE,
    output_range: tuple[int, int] = DEFAULT_RANGE,
    num_tenants: int = 1,
    seed: int = 42,
) -> Trace:
    """Return one Gamma process whose requests name adapters with probability ~ (i + 1)^-s.

    Adapter i belongs to tenant i mod `num_tenants`.
    """
    rng = np.random.default_rng(seed)
    num = int(rate * duration_s)
    adapter = _draw(rng, zipf_shares(num_adapters, zipf_s), num)
    return Trace(
        name=f"zipf n={num_adapters} R={rate:g} zipf={zipf_s:g} cv={cv:g}",
        arrival_s=np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, num)),
        adapter=adapter,
        tenant=adapter % num_tenants,
        prompt_len=rng.integers(*input_range, num),
        output_len=rng.integers(*output_range, num),
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
    )


def punica_trace(
    *, popularity: str, num_requests: int = 1000, rate: float = 1e6, seed: int = 0xABCDABCD987
) -> Trace:
    """Return Punica's workload: all requests at once, of lognormal lengths.

    `popularity`: distinct (one adapter each), uniform (ceil(sqrt(n)) adapters), skewed (so many,
    each 1.5 times as popular as the next) or identical. Prompts are 18 exp(0.8 N(0, 1)) - 1, in
    scipy's words lognorm(s=0.8, loc=-1, scale=18); prompt and answer add up to U[2, 2048).
    """
    rng = np.random.default_rng(seed)
    few = math.ceil(math.sqrt(num_requests))
    shares = {
        "distinct": np.full(num_requests, 1 / num_requests),
        "uniform": np.full(few, 1 / few),
        "skewed": 1.5 ** -np.arange(few),
        "identical": np.ones(1),
    }[popularity]
    adapter = _draw(rng, shares / shares.sum(), num_requests)
    if popularity == "distinct":
        adapter = np.arange(num_requests)
    drawn = 18 * np.exp(0.8 * rng.standard_normal(num_requests)) - 1
    prompt_len = np.clip(np.rint(drawn), 2, 1024).astype(np.int64)
    total = rng.integers(2, 2048, num_requests)
    return Trace(
        name=f"punica {popularity}",
        arrival_s=np.cumsum(np.full(num_requests, 1 / rate)),
        adapter=adapter,
        prompt_len=prompt_len,
        output_len=np.maximum(1, total - prompt_len),
        num_adapters=len(shares),
        rate=rate,
        duration_s=num_requests / rate,
    )


#: The shape of the Azure conversation trace (2023: medians 1020 in, 129 out), prompts cut to a
#: quarter: at full length one A40 cannot even prefill the 8 to 13 requests per second that
#: Chameleon reports (1020 x 13 GFLOP x 9 / s = 119 TFLOP/s of its 150).
CHAMELEON_PROMPT = Lengths(median=255, sigma=1.0, least=8, most=2048)
CHAMELEON_OUTPUT = Lengths(median=64, sigma=0.8, least=2, most=512)
CHAMELEON_RANKS = (8, 16, 32, 64, 128)


def chameleon_trace(
    *,
    rate: float,
    duration_s: float,
    num_adapters: int = 100,
    zipf_s: float = 1.0,
    seed: int = 42,
) -> Trace:
    """Return Chameleon's mix: Poisson; the rank is uniform, the adapter inside it a power law.

    Adapter j has rank class j mod 5, and is the (j // 5 + 1)-th most popular of its class.
    """
    rng = np.random.default_rng(seed)
    num = int(rate * duration_s)
    num_ranks = len(CHAMELEON_RANKS)
    inside = _draw(rng, zipf_shares(num_adapters // num_ranks, zipf_s), num)
    return Trace(
        name=f"chameleon n={num_adapters} R={rate:g}",
        arrival_s=np.cumsum(rng.exponential(1 / rate, num)),
        adapter=inside * num_ranks + rng.integers(0, num_ranks, num),
        prompt_len=CHAMELEON_PROMPT.draw(rng, num),
        output_len=CHAMELEON_OUTPUT.draw(rng, num),
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
    )


def vtc_trace(
    *,
    rates: Sequence[float],
    duration_s: float,
    length: int = 256,
    on_off_s: float | None = None,
    is_poisson: bool = False,
    seed: int = 42,
) -> Trace:
    """Return VTC's workload: one tenant and one adapter per client, each at its own rate.

    Evenly spaced requests, or Poisson. With `on_off_s` the first client sends only in every other
    span of that length.
    """
    rng = np.random.default_rng(seed)
    arrivals, clients = [], []
    for client, rate in enumerate(rates):
        num = int(rate * duration_s)
        gaps = rng.exponential(1 / rate, num) if is_poisson else np.full(num, 1 / rate)
        times = np.cumsum(gaps)
        if on_off_s is not None and client == 0:
            times = times[(times // on_off_s) % 2 == 0]
        arrivals.append(times)
        clients.append(np.full(len(times), client, np.int64))
    arrival_s, client_of = np.concatenate(arrivals), np.concatenate(clients)
    order = np.argsort(arrival_s, kind="stable")
    lengths = np.full(len(order), length, np.int64)
    return Trace(
        name=f"vtc {'/'.join(f'{rate:g}' for rate in rates)} per s",
        arrival_s=arrival_s[order],
        adapter=client_of[order],
        prompt_len=lengths,
        output_len=lengths,
        num_adapters=len(rates),
        rate=float(sum(rates)),
        duration_s=duration_s,
        tenant=client_of[order],
    )


def multi_turn_trace(
    *,
    rate: float,
    duration_s: float,
    num_adapters: int,
    zipf_s: float = 1.0,
    mean_turns: float = 5.0,
    think_s: float = 8.0,
    shared_len: int = 128,
    seed: int = 42,
) -> Trace:
    """Return chats: geometric numbers of turns, exponential pauses, one system prompt per adapter.

    As ELORA's multi-turn agents (Taskmaster): short turns (lognormal, medians 60 in, 90 out).
    `rate` counts requests, so conversations start at `rate / mean_turns`.
    """
    rng = np.random.default_rng(seed)
    num_chats = max(1, int(rate * duration_s / mean_turns))
    starts = np.cumsum(rng.exponential(mean_turns / rate, num_chats))
    turns = rng.geometric(1 / mean_turns, num_chats)
    adapter_of_chat = _draw(rng, zipf_shares(num_adapters, zipf_s), num_chats)
    chat = np.repeat(np.arange(num_chats), turns)
    num = len(chat)
    is_first = np.diff(chat, prepend=-1) > 0
    return Trace(
        name=f"multi-turn n={num_adapters} R={rate:g}",
        arrival_s=np.where(is_first, starts[chat], rng.exponential(think_s, num)),
        adapter=adapter_of_chat[chat],
        prompt_len=Lengths(median=60, sigma=0.7, least=4, most=512).draw(rng, num),
        output_len=Lengths(median=90, sigma=0.7, least=4, most=512).draw(rng, num),
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
        follows=np.where(is_first, NOBODY, np.arange(num) - 1),
        shared_len=shared_len,
    )


def zipf_shares(num: int, zipf_s: float) -> Floats:
    """Return probabilities in proportion to 1, 2^-s, 3^-s, ..."""
    weights = np.arange(1, num + 1, dtype=np.float64) ** -zipf_s
    shares: Floats = weights / weights.sum()
    return shares


def _draw(rng: np.random.Generator, shares: Floats, num: int) -> Ints:
    """Draw indices with the given probabilities."""
    drawn = np.searchsorted(np.cumsum(shares), rng.random(num), side="right")
    return np.minimum(drawn, len(shares) - 1).astype(np.int64)


def _renewals(rng: np.random.Generator, rate: float, duration_s: float, cv: float) -> Floats:
    """Return the arrivals of one Gamma renewal process in (0, duration_s)."""
    times = -rng.random() / rate + np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, 8))
    while times[-1] < duration_s:
        expected = int((duration_s - times[-1]) * rate) + 8
        more = times[-1] + np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, expected))
        times = np.concatenate([times, more])
    inside: Floats = times[(times >= 0) & (times < duration_s)]
    return inside
