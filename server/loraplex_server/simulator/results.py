"""What happened to every request of a run, and the metrics over it.

Definitions are S-LoRA's (section 2.4 of its evaluation and its scripts) where it has them:

- throughput: completed requests / time from the start to the last answer, drain included
- strip throughput: (completed - 2 x 10 s x rate) / (time - 20 s)
- steady throughput: answers per second between the first and the third quartile of their ends;
  neither filling nor draining counts, so under a flood it is the capacity
- attainment: share of all requests whose first token came within the SLO; refused ones did not
- satisfaction: mean of max(0, 1 - (TTFT / SLO)^2) over all requests
- TPOT: (last token - first token) / (tokens - 1), of answers of two tokens and more
- goodput: completed requests whose first token came within the SLO, per second of throughput's time
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Final

import numpy as np

from loraplex_server.simulator.trace import NOBODY, Floats, Ints, Trace

SLORA_SLO_S: Final = 6.0


@dataclass(frozen=True)
class Counters:
    """Sums over all replicas of a run."""

    num_steps: int = 0
    busy_s: float = 0.0
    num_preemptions: int = 0
    num_adapter_evictions: int = 0
    num_prefix_evictions: int = 0
    num_loads: int = 0
    num_host_hits: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    adapter_queries: int = 0
    adapter_hits: int = 0
    num_loaded_pages: int = 0
    num_fetches: int = 0
    fetched_bytes: float = 0.0

    def __add__(self, other: Counters) -> Counters:
        mine, theirs = asdict(self), asdict(other)
        return Counters(**{name: mine[name] + theirs[name] for name in mine})


class Found(IntEnum):
    """Where a request's adapter was when it reached its replica."""

    POOL = 0
    HOST = 1
    COLD = 2
    NOT_ASKED = 3


class Record:
    """Filled in while the simulation runs; NaN is "never"."""

    def __init__(self, trace: Trace) -> None:
        num = len(trace)
        never = float("nan")
        self.arrival_s = [never] * num
        self.first_s = [never] * num
        self.end_s = [never] * num
        self.num_cached = [0] * num
        self.num_ends = [0] * num
        self.found = [Found.NOT_ASKED] * num
        self.replica = [NOBODY] * num


@dataclass(frozen=True)
class Outcome:
    """One finished run. Arrays have one entry per request of the trace.

    Attributes:
        end_s: when the last token came; NaN for requests that were turned away or dropped.
        found: where each request's adapter was, a `Found`.
        replica: which replica each request was sent to last.
        wall_s: real time that the simulation took.
    """

    trace: Trace
    arrival_s: Floats
    first_s: Floats
    end_s: Floats
    num_cached: Floats
    counters: Counters
    num_rejected: int
    wall_s: float
    found: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    replica: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def ttft_s(self) -> Floats:
        """Time to first token; NaN where none came."""
        return self.first_s - self.arrival_s

    def summary(self, slo_s: float = SLORA_SLO_S) -> Summary:
        return summarize(self, slo_s)


@dataclass(frozen=True)
class Summary:
    """The metrics of one run; times in seconds, throughputs per second."""

    num_requests: int
    num_completed: int
    num_rejected: int
    duration_s: float
    throughput: float
    strip_throughput: float
    steady_throughput: float
    tokens_per_s: float
    goodput: float
    latency_mean: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    attainment: float
    satisfaction: float
    adapter_hit_rate: float
    prefix_hit_rate: float
    host_hit_rate: float
    num_loads: int
    num_adapter_evictions: int
    num_preemptions: int
    utilization: float
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics by name, rounded to five digits."""
        return {
            name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def summarize(outcome: Outcome, slo_s: float) -> Summary:
    """Compute every metric of the module's docstring."""
    trace, counters = outcome.trace, outcome.counters
    is_complete = ~np.isnan(outcome.end_s)
    num_completed = int(is_complete.sum())
    duration_s = float(np.nanmax(outcome.end_s)) if num_completed else float("nan")
    ttft = outcome.ttft_s[~np.isnan(outcome.first_s)]
    is_in_time = outcome.ttft_s <= slo_s  # False where NaN
    long_enough = is_complete & (trace.output_len > 1)
    decoding_s = (outcome.end_s - outcome.first_s)[long_enough]
    tpot = decoding_s / (trace.output_len[long_enough] - 1)
    tokens = (trace.prompt_len + trace.output_len)[is_complete].sum()
    num = len(trace)
    return Summary(
        num_requests=num,
        num_completed=num_completed,
        num_rejected=outcome.num_rejected,
        duration_s=duration_s,
        throughput=num_completed / duration_s,
        strip_throughput=(num_completed - 20 * trace.rate) / (duration_s - 20),
        steady_throughput=steady_throughput(outcome),
        tokens_per_s=float(tokens) / duration_s,
        goodput=float((is_in_time & is_complete).sum()) / duration_s,
        latency_mean=_mean((outcome.end_s - outcome.arrival_s)[is_complete]),
        ttft_mean=_mean(ttft),
        ttft_p50=_percentile(ttft, 50),
        ttft_p95=_percentile(ttft, 95),
        ttft_p99=_percentile(ttft, 99),
        tpot_p50=_percentile(tpot, 50),
        tpot_p99=_percentile(tpot, 99),
        attainment=float(is_in_time.sum()) / max(1, num),
        satisfaction=float(np.maximum(0.0, 1 - (ttft / slo_s) ** 2).sum()) / max(1, num),
        adapter_hit_rate=_share(counters.adapter_hits, counters.adapter_queries),
        prefix_hit_rate=_share(counters.prefix_hits, counters.prefix_queries),
        host_hit_rate=_share(counters.num_host_hits, counters.num_loads),
        num_loads=counters.num_loads,
        num_adapter_evictions=counters.num_adapter_evictions,
        num_preemptions=counters.num_preemptions,
        utilization=counters.busy_s / duration_s,
        wall_s=outcome.wall_s,
    )


def steady_throughput(outcome: Outcome) -> float:
    """Return answers per second between the quartiles of their ends."""
    end_s = np.sort(outcome.end_s[~np.isnan(outcome.end_s)])
    first, last = len(end_s) // 4, 3 * len(end_s) // 4
    if first == last or end_s[first] == end_s[last]:
        return float("nan")
    return float((last - first) / (end_s[last] - end_s[first]))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
