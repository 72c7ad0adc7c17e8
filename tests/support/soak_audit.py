"""What a server must show when a soak has ended: nothing held, nothing running, sums that agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import resident_pages
from tests.support.server_process import ServerProcess
from tests.support.soak import Tally

_PAGE_MIB = 4096 / (1 << 20)
_SETTLE_S = 60.0


@dataclass
class MemoryLog:
    """Resident memory of API and engine process over the requests sent."""

    api_pid: int
    engine_pid: int
    samples: list[tuple[int, float, float]] = field(default_factory=list)

    def sample(self, num_requests: int) -> None:
        """Note how much both take now, in MiB."""
        self.samples.append((num_requests, _rss_mib(self.api_pid), _rss_mib(self.engine_pid)))

    def slopes(self) -> tuple[float, float]:
        """Return the growth of both over the second half, in MiB per 1,000 requests."""
        later = self.samples[len(self.samples) // 2 :]
        sent = [num for num, _, _ in later]
        api, engine = [s[1] for s in later], [s[2] for s in later]
        return (
            1000 * statistics.linear_regression(sent, api).slope,
            1000 * statistics.linear_regression(sent, engine).slope,
        )


def _rss_mib(pid: int) -> float:
    return resident_pages(pid) * _PAGE_MIB


def outcomes(server: ServerProcess) -> dict[str, int]:
    """Return the sequences that ended, by outcome, as the server counts them."""
    text = httpx.get(f"{server.base_url}/metrics", timeout=30).text
    return {
        sample.labels["outcome"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "loraplex_requests_finished_total"
    }


def settle(server: ServerProcess) -> None:
    """Wait until nothing runs; raises AssertionError where something is stuck."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        load = httpx.get(f"{server.base_url}/load", timeout=30).json()
        pool = server.pool()
        if not any(load.values()) and not pool["kv"] and not pool["prefix_used"]:
            return
        assert time.monotonic() < deadline, f"stuck: {load}, {pool}"
        time.sleep(0.1)


def leaks(server: ServerProcess) -> list[str]:
    """Return what is held though no request runs and no adapter is registered."""
    pool, found = server.pool(), []
    if pool["free"] + pool["prefix_idle"] != pool["num_pages"]:
        found.append(f"pages: {pool}")
    if [holder for holder in pool["by_adapter"] if holder["id"] is not None]:
        found.append(f"pages of deleted adapters: {pool['by_adapter']}")
    if pool["host"]["bytes"] or pool["host"]["adapters"]:
        found.append(f"host memory: {pool['host']}")
    staged = [*(server.log.parent / "data" / "staging").iterdir()]
    if staged:
        found.append(f"half uploads: {staged}")
    return found


def disagreements(tally: Tally, counted: Mapping[str, int]) -> list[str]:
    """Return where the server's counters are not what clients saw.

    Of clients that left nobody knows how their sequences ended, only how many there can be.
    """
    found, seen = [], tally.ended
    for outcome in ("stop", "length", "timed_out", "cancelled", "rejected"):
        extra = counted[outcome] - seen[outcome]
        if not 0 <= extra <= tally.unseen:
            found.append(f"{outcome}: {counted[outcome]} counted, {seen[outcome]} seen")
    extra = sum(counted.values()) - sum(seen.values())
    if not 0 <= extra <= tally.unseen:
        found.append(f"{extra} ends that no client saw; {tally.unseen} clients did not look")
    if counted["failed"] or counted["refused"]:
        found.append(f"failed: {counted['failed']}, refused: {counted['refused']}")
    return found


def table(tally: Tally, counted: Mapping[str, int], memory: MemoryLog) -> str:
    """Return what happened, for people."""
    rows: Sequence[tuple[str, object]] = [
        *sorted(tally.statuses.items()),
        *((f"ended {name}, seen/counted", f"{tally.ended[name]}/{counted[name]}")
          for name in counted),
        ("sequences of clients that left", tally.unseen),
        ("problems", len(tally.problems)),
    ]  # fmt: skip
    lines = [f"{name:34} {value!s:>12}" for name, value in rows]
    for index, name in ((1, "API"), (2, "engine")):
        values = [sample[index] for sample in memory.samples]
        middle = values[len(values) // 2]
        lines.append(
            f"{name + ' MiB first/middle/last':34} {values[0]:.1f}/{middle:.1f}/{values[-1]:.1f}"
        )
    return "\n".join(lines)
