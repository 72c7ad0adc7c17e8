"""Thousands of badly behaved requests against a real server: `python -m tests.e2e.run_soak`.

What must hold at the end: no page and no byte of host memory held by anybody, no request stuck,
exactly one terminal event for each sequence, counters that agree with what clients saw, no error
that was not asked for, and resident memory of both processes that does not grow over the second
half. Prints a table, then one JSON line; the exit code is 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.support.soak import Soak
from tests.support.soak_audit import MemoryLog, disagreements, leaks, outcomes, settle, table
from tests.support.tiny_serving import TinyServer, save_tiny_adapter

#: What may be noise of allocators, in MiB per 1,000 requests.
_FLAT_MIB = 1.0
#: Before so many, allocators are still growing into their size.
_MIN_JUDGED = 5000
_NUM_SAMPLES = 100


def make_adapters(folder: Path, num: int) -> dict[str, Path]:
    """Write so many adapters of ranks 1 to 32; return their folders by name."""
    names = [f"a{i:02}" for i in range(num)]
    return {
        name: save_tiny_adapter(folder / name, seed=i, rank=2 ** (i % 6))
        for i, name in enumerate(names)
    }


def run(folder: Path, *, requests: int, concurrency: int, adapters: int, seed: int) -> dict:
    """Run a soak against a server of its own and return the figures; `problems` should be []."""
    folders = make_adapters(folder, adapters)
    server = TinyServer(folder, "--max-queued", "256")
    try:
        server.wait_until_ready()
        figures = soak(server, folders, requests=requests, concurrency=concurrency, seed=seed)
    finally:
        code = server.stop()
    if code:
        figures["problems"].append(f"the server exited with {code}: {server.log.read_text()}")
    return figures


def soak(
    server: TinyServer, folders: dict[str, Path], *, requests: int, concurrency: int, seed: int = 0
) -> dict:
    """Send the requests, delete all adapters and return the figures."""
    memory = MemoryLog(server.process.pid, server.engine_pid())
    interval = max(1, requests // _NUM_SAMPLES)

    def on_progress(index: int) -> None:
        if index % interval == 0:
            memory.sample(index)

    async def send() -> Soak:
        soak = Soak(server.base_url, folders, seed=seed)
        await soak.run(requests, concurrency, on_progress)
        await asyncio.to_thread(settle, server)
        await soak.close()
        return soak

    started_s = time.monotonic()
    tally = asyncio.run(send()).tally
    seconds = time.monotonic() - started_s
    settle(server)
    counted = outcomes(server)
    problems = [*tally.problems, *leaks(server), *disagreements(tally, counted)]
    print(table(tally, counted, memory))
    api_slope, engine_slope = memory.slopes()
    return {
        "requests": requests,
        "concurrency": concurrency,
        "adapters": len(folders),
        "seconds": round(seconds, 1),
        "sequences": sum(counted.values()),
        "outcomes": counted,
        "api_mib_per_1000": round(api_slope, 3),
        "engine_mib_per_1000": round(engine_slope, 3),
        "api_mib": round(memory.samples[-1][1], 1),
        "engine_mib": round(memory.samples[-1][2], 1),
        "problems": problems,
    }


def main() -> int:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        figures = run(Path(folder), **vars(args))
    for process in ("api", "engine"):
        slope = figures[f"{process}_mib_per_1000"]
        if slope > _FLAT_MIB and args.requests >= _MIN_JUDGED:
            figures["problems"].append(f"{process} grows by {slope} MiB per 1,000 requests")
    for problem in figures["problems"][:50]:
        print("PROBLEM", problem)
    print(json.dumps(figures))
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
