"""A closed loop over HTTP: so many requests in flight, the next one when one ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import httpx
from workload import Timing, Work


def run_closed_loop(
    base_url: str, work: Sequence[Work], models: Sequence[str], base: str, concurrency: int
) -> tuple[list[Timing], float]:
    """Send all work with `concurrency` requests in flight; return timings and wall seconds.

    Args:
        models: names of the adapters that `Work.adapter` indexes.
        base: name of the base model.
    """
    return asyncio.run(_run(base_url, work, models, base, concurrency))


async def _run(
    base_url: str, work: Sequence[Work], models: Sequence[str], base: str, concurrency: int
) -> tuple[list[Timing], float]:
    queue = list(reversed(work))
    timings: list[Timing] = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits) as client:

        async def worker() -> None:
            while queue:
                item = queue.pop()
                model = base if item.adapter is None else models[item.adapter]
                timings.append(await _stream(client, item, model))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return timings, time.perf_counter() - started


async def _stream(client: httpx.AsyncClient, item: Work, model: str) -> Timing:
    body = {
        "model": model,
        "prompt": list(item.prompt),
        "max_tokens": item.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, arrivals, usage = time.perf_counter(), [], None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            usage = event.get("usage") or usage
            if event["choices"]:
                arrivals.append(time.perf_counter() - started)
    if not usage or usage["completion_tokens"] != item.num_output:
        raise RuntimeError(f"asked for {item.num_output} tokens, got {usage}")
    return Timing(item.num_output, tuple(arrivals))
