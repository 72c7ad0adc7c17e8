"""What every routing policy is, and what it may know."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica's metrics said when they were last read (`vllm:lora_requests_info`, queue).

    Attributes:
        num_waiting: requests that no step has taken up.
        ready: ids of the adapters in its pool.
        waited_for: of those that requests wait for and that are not in the pool.
        max_adapters: how many of the present mean size its pool can hold.
    """

    num_waiting: int
    ready: Collection[str]
    waited_for: Collection[str]
    max_adapters: int


@dataclass
class FleetView:
    """What a router knows: owned by the fleet, which keeps it up to date.

    Attributes:
        in_flight: requests sent to each replica and not ended, by the router's own count.
        alive: indices of the replicas that can be chosen, in order.
        reports: of every replica, dead ones too; empty for policies that read none.
    """

    in_flight: list[int]
    alive: list[int]
    reports: Sequence[ReplicaReport] = field(default_factory=tuple)


class Router(Protocol):
    """Decides who serves a request, knowing only a `FleetView`.

    Attributes:
        report_every_s: how often it reads the replicas' metrics; None: never.
        forgets: an adapter that left the pool of its home goes anywhere, wherever its host copy is.
    """

    report_every_s: float | None
    forgets: bool

    def choose(self, adapter: int, fleet: FleetView) -> int:
        """Return the replica's index, one of those that are alive."""

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        """Return the replicas that an adapter is asked of when the fleet is in balance.

        `share` is its share of all requests. Only a warm start asks (see `warmth`).
        """

    def spill(self, adapter: int, alive: Sequence[int]) -> Sequence[int]:
        """Return the replicas that get its requests when its homes have too many, first first."""
