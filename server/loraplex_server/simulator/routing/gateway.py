"""The endpoint picker of the Gateway API inference extension, with its LoRA scorer."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final

import numpy as np

from loraplex_server.simulator.requests import adapter_id
from loraplex_server.simulator.routing.preferences import hashed
from loraplex_server.simulator.routing.router import FleetView, ReplicaReport
from loraplex_server.simulator.routing.spread import STREAM

#: The picker reads every endpoint's metrics so often (its default).
REPORT_EVERY_S: Final = 0.05

_ACTIVE, _HAS_ROOM, _WAITED_FOR, _NEITHER = 1.0, 0.8, 0.6, 0.0


class GatewayPicker:
    """The highest sum of `lora-affinity-scorer` and `queue-scorer`; any of the best, at random.

    What it reads is up to 50 ms old, so requests in between do not see each other. The queue scorer
    stretches whatever differs between queues over 0 to 1. The weights that it begins with are those
    of one published deployment. Neither they nor `ReplicaReport.max_adapters` are what our own
    chart has: its `max_lora` counts idle adapters as room, and two more scorers have a say.
    """

    report_every_s: float | None = REPORT_EVERY_S
    forgets = True

    def __init__(
        self, *, lora_weight: float = 1.0, queue_weight: float = 2.0, seed: int = 42
    ) -> None:
        self._lora_weight = lora_weight
        self._queue_weight = queue_weight
        self._rng = np.random.default_rng([seed, STREAM])

    def choose(self, adapter: int, fleet: FleetView) -> int:
        reports = [fleet.reports[i] for i in fleet.alive]
        waiting = [report.num_waiting for report in reports]
        least, span = min(waiting), max(waiting) - min(waiting)
        best, chosen = -1.0, [fleet.alive[0]]
        name = adapter_id(adapter)
        for replica, report in zip(fleet.alive, reports, strict=True):
            queue = 1.0 - (report.num_waiting - least) / span if span else 1.0
            score = self._queue_weight * queue + self._lora_weight * lora_score(name, report)
            if score > best:
                best, chosen = score, [replica]
            elif score == best:
                chosen.append(replica)
        return chosen[int(self._rng.random() * len(chosen))]

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        """Return one replica, wherever it was first asked for; several for what fills them."""
        num, first = len(alive), hashed(f"adapter {adapter}")
        return [alive[(first + i) % num] for i in range(max(1, ceil(share * num)))]

    def spill(self, adapter: int, alive: Sequence[int]) -> Sequence[int]:
        del adapter, alive
        return ()


def lora_score(adapter: str, report: ReplicaReport) -> float:
    """Return what the LoRA scorer gives an endpoint."""
    if adapter in report.ready:
        return _ACTIVE
    if len(report.ready) + len(report.waited_for) < report.max_adapters:
        return _HAS_ROOM
    return _WAITED_FOR if adapter in report.waited_for else _NEITHER
