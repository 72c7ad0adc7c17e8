"""Which policies an engine runs with: their names and numbers, and the objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from loraplex_memory.eviction import (
    CostAware,
    DropUnused,
    EvictionPolicy,
    LeastRecentlyUsed,
)
from loraplex_scheduler.admission import AdmissionPolicy, Expected, Greedy, WorstCase
from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_scheduler.batching import BatchingPolicy, MixedBatching, SeparatePrefill
from loraplex_scheduler.clustering import ClusteringPolicy, NoClustering, SoftClustering
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.overload import KeepPromises, NoOverloadControl, OverloadPolicy
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.step_times import CalibratedStepTimes, StepTimes
from loraplex_scheduler.vtc import FairQueue
from loraplex_scheduler.waiting import (
    OLDEST_EVERY,
    OrderedQueue,
    WaitingQueue,
    arrival_key,
    deadline_key,
    latest_key,
)

ORDERS: Final = ("vtc", "vtc-adapter", "fcfs", "lcfs", "edf")
ADMISSIONS: Final = ("expected", "worst-case", "greedy")
EVICTIONS: Final = ("cost", "lru", "unused")
BATCHINGS: Final = ("mixed", "separate")
OVERLOADS: Final = ("promises", "none")


@dataclass(frozen=True)
class PolicyChoice:
    """Policies by name.

    Attributes:
        order: of service: fair among tenants (`vtc`; with one tenant that is `fcfs`) or adapters
            (`vtc-adapter`), by arrival, latest first, earliest deadline first.
        admission: how much of the pool newcomers leave to those who run.
        eviction: which idle adapters and prefix pages leave first.
        batching: prompts beside decodes, or in steps of their own, considered every tenth step.
        overload: whether requests are refused or dropped whose promise cannot be kept.
        has_prefix_cache: computed prompts are kept for those who start alike.
        cluster_wait_s: a newcomer with one more adapter waits this long for better company; 0 for
            not at all.
        ttft_slo_s: seconds from arrival to the first token that are promised to every request which
            asks for nothing else; None for no promise.
        tenant_weights: shares relative to each other under `vtc`; 1 for those not named.
    """

    order: str = "vtc"
    admission: str = "expected"
    eviction: str = "cost"
    batching: str = "mixed"
    overload: str = "promises"
    has_prefix_cache: bool = True
    cluster_wait_s: float = 0.0
    ttft_slo_s: float | None = None
    tenant_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: one is not among the names or out of range.
        """
        for name, allowed in (
            ("order", ORDERS),
            ("admission", ADMISSIONS),
            ("eviction", EVICTIONS),
            ("batching", BATCHINGS),
            ("overload", OVERLOADS),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {known}")
        if not 0 <= self.cluster_wait_s < float("inf"):
            raise ValueError(f"cluster_wait_s is {self.cluster_wait_s}; it must be 0 or more")
        if self.ttft_slo_s is not None and not self.ttft_slo_s > 0:
            raise ValueError(f"ttft_slo_s is {self.ttft_slo_s}; it must be positive")
        for tenant, weight in self.tenant_weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {tenant!r} is {weight}; it must be positive")


#: S-LoRA's own, to be compared with (arXiv 2311.03285, sections 4 and 5, and its code).
S_LORA: Final = PolicyChoice(
    order="fcfs",
    admission="worst-case",
    eviction="unused",
    batching="separate",
    overload="none",
    has_prefix_cache=False,
)


@dataclass
class Policies:
    """The policies of one engine; owned by its scheduler, never shared.

    Attributes:
        times: predicts steps and loads, and learns from them.
        lengths: predicts answers; learns from those that the admission policy sees end.
    """

    queue: WaitingQueue
    admission: AdmissionPolicy
    batching: BatchingPolicy
    clustering: ClusteringPolicy
    overload: OverloadPolicy
    times: StepTimes
    lengths: AnswerLengths


def make_policies(
    choice: PolicyChoice,
    limits: SchedulerLimits,
    page_tokens: int,
    times: StepTimes | None = None,
) -> Policies:
    """Make the policies of one engine.

    Args:
        page_tokens: tokens of KV per page.
        times: the same object that the memory's evictor asks; None for one of its own.
    """
    lengths = AnswerLengths()
    times = times or CalibratedStepTimes(page_tokens)
    return Policies(
        queue=_queue(choice),
        admission=_admission(choice, lengths, limits, page_tokens),
        batching=MixedBatching() if choice.batching == "mixed" else SeparatePrefill(),
        clustering=(
            SoftClustering(times, choice.cluster_wait_s)
            if choice.cluster_wait_s
            else NoClustering()
        ),
        overload=(
            KeepPromises(times, lengths, choice.ttft_slo_s)
            if choice.overload == "promises"
            else NoOverloadControl()
        ),
        times=times,
        lengths=lengths,
    )


def make_eviction(choice: PolicyChoice) -> EvictionPolicy:
    """Make the policy that the memory's evictor ranks by."""
    if choice.eviction == "cost":
        return CostAware()
    return LeastRecentlyUsed() if choice.eviction == "lru" else DropUnused()


def _queue(choice: PolicyChoice) -> WaitingQueue:
    if choice.order == "vtc":
        return FairQueue(_tenant, choice.tenant_weights)
    if choice.order == "vtc-adapter":
        return FairQueue(_adapter)
    if choice.order == "lcfs":
        return OrderedQueue(latest_key, oldest_every=OLDEST_EVERY)
    return OrderedQueue(deadline_key if choice.order == "edf" else arrival_key)


def _admission(
    choice: PolicyChoice, lengths: AnswerLengths, limits: SchedulerLimits, page_tokens: int
) -> AdmissionPolicy:
    if choice.admission == "greedy":
        return Greedy(lengths)
    budget = limits.max_step_tokens
    if choice.admission == "expected":
        return Expected(lengths, page_tokens, budget)
    return WorstCase(lengths, page_tokens, budget, has_prefix_cache=choice.has_prefix_cache)


def _tenant(sequence: Sequence) -> str:
    return sequence.request.tenant


def _adapter(sequence: Sequence) -> str:
    return sequence.adapter_id or ""
