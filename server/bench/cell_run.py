"""Running one cell against a started server, and an adapter's first use against its second."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from http_load import run_load
from peer_cells import Cell
from peer_servers import RunningServer
from process_tree import ProcessTree, machine_cpu_s
from workload import Work, make_skewed_work, summarize

_SAMPLE_S = 5.0
_SILENCE_S = 1.0
#: Prompt and answer of the requests that look at first uses.
_COLD_PROMPT, _COLD_OUTPUT = (32, 32), (8, 8)


class PeakMemory:
    """The largest of some samples of a process tree, in bytes."""

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self.peak_bytes = 0

    def sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._tree.pss_bytes())

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample now and then while the block runs, and at its end."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(_SAMPLE_S):
                self.sample()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.sample()


def wait_for_silence(server: RunningServer, quiet_below: float, limit_s: float) -> None:
    """Return once others take less than `quiet_below` cores; after `limit_s` in any case."""
    tree, deadline = ProcessTree(server.pid), time.monotonic() + limit_s
    while True:
        others_s = machine_cpu_s() - tree.cpu_s()
        started = time.monotonic()
        time.sleep(_SILENCE_S)
        others_s = machine_cpu_s() - tree.cpu_s() - others_s
        now = time.monotonic()
        if others_s / (now - started) < quiet_below or now > deadline:
            return


def run_cell(
    server: RunningServer, cell: Cell, seed: int, adapters: Path, attempt: int = 0
) -> dict[str, Any]:
    """Run one closed loop; return its figures. Shares are of one core.

    Args:
        attempt: another one has other prompts of the same lengths.
    """
    work = cell.work(seed, attempt)
    used = [item.adapter for item in work if item.adapter is not None]
    load_s = server.load(used, adapters)
    tree = ProcessTree(server.pid)
    memory = PeakMemory(tree)
    with memory.sampling():
        machine_s, server_s = machine_cpu_s(), tree.cpu_s()
        result = run_load(server.peer.base_url, work, server.peer.body, cell.concurrency)
        server_s, machine_s = tree.cpu_s() - server_s, machine_cpu_s() - machine_s
    other_s = machine_s - server_s - result.client_cpu_s
    figures: dict[str, Any] = {
        "completed": len(result.timings),
        "failed": len(result.failures),
        "mismatched": len(result.mismatches),
        "problems": (result.failures + result.mismatches)[:3],
        "distinct_adapters": len(set(used)),
        "wall_s": result.wall_s,
        "server_cpu_share": server_s / result.wall_s,
        "client_cpu_share": result.client_cpu_s / result.wall_s,
        "other_cpu_share": other_s / result.wall_s,
        "pss_peak_mb": memory.peak_bytes / 1e6,
    }
    if load_s:
        figures["load_call_p50_ms"] = 1e3 * statistics.median(load_s)
    if result.timings:
        figures |= summarize(result.timings, result.wall_s)
    return figures


def warm_up(server: RunningServer) -> None:
    """Send two tiny requests to the base model: first steps compile and allocate."""
    work = make_skewed_work(2, 0, 999, num_prompt=_COLD_PROMPT, num_output=_COLD_OUTPUT)
    run_load(server.peer.base_url, work, server.peer.body, 2)


def run_cold(
    server: RunningServer, indexes: Sequence[int], seed: int, adapters: Path
) -> dict[str, Any]:
    """Time the first token of adapters never used since the start, and again of the same ones.

    One request at a time; every prompt is another one, so that only the adapter is warm.

    Args:
        indexes: adapters that nothing has used.
    """
    prompts = make_skewed_work(
        3 * len(indexes), 0, seed, num_prompt=_COLD_PROMPT, num_output=_COLD_OUTPUT, ids_salt="cold"
    )
    ttft_ms: dict[str, list[float]] = {"cold": [], "warm": [], "base": []}
    load_s: list[float] = []
    failures: list[str] = []
    for i, index in enumerate(indexes):
        load_s += server.load([index], adapters)
        for j, kind in enumerate(ttft_ms):
            plain = prompts[3 * i + j]
            item = Work(None if kind == "base" else index, plain.prompt, plain.num_output)
            result = run_load(server.peer.base_url, [item], server.peer.body, 1)
            ttft_ms[kind] += [1e3 * timing.ttft_s for timing in result.timings]
            failures += result.failures
    figures: dict[str, Any] = {"failed": len(failures), "problems": failures[:3]}
    for kind, values in ttft_ms.items():
        figures[f"{kind}_ttft_p50_ms"] = statistics.median(values) if values else None
    if load_s:
        figures["load_call_p50_ms"] = 1e3 * statistics.median(load_s)
    extra = [cold - warm for cold, warm in zip(ttft_ms["cold"], ttft_ms["warm"], strict=False)]
    figures["extra_ttft_p50_ms"] = statistics.median(extra) if extra else None
    return figures
