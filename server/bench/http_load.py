"""A closed loop over HTTP: so many requests in flight, the next one when one ends."""

from __future__ import annotations

import asyncio
import resource
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from recorded_response import RecordedResponse, ResponseError, exchange, request_bytes
from workload import Timing, Work

COMPLETIONS = "/v1/completions"


@dataclass
class LoadResult:
    """What a closed loop saw.

    Attributes:
        timings: of the requests that were answered.
        wall_s: from the first request sent to the last answer's end.
        client_cpu_s: processor time that this process took meanwhile.
        failures: what was wrong with the others.
        mismatches: answers with another number of tokens than was asked for, in words.
    """

    timings: list[Timing] = field(default_factory=list)
    wall_s: float = 0.0
    client_cpu_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)


def completion_body(item: Work, model: str) -> dict[str, Any]:
    """Return the body of a streamed completion of exactly `num_output` tokens."""
    return {
        "model": model,
        "prompt": list(item.prompt),
        "max_tokens": item.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def run_closed_loop(
    base_url: str, work: Sequence[Work], models: Sequence[str], base: str, concurrency: int
) -> tuple[list[Timing], float]:
    """Send all work with `concurrency` requests in flight; return timings and wall seconds.

    Args:
        models: names of the adapters that `Work.adapter` indexes.
        base: name of the base model.

    Raises:
        RuntimeError: a request failed, or its answer was not as long as asked for.
    """

    def body_of(item: Work) -> dict[str, Any]:
        return completion_body(item, base if item.adapter is None else models[item.adapter])

    result = run_load(base_url, work, body_of, concurrency)
    for problem in (*result.failures, *result.mismatches):
        raise RuntimeError(problem)
    return result.timings, result.wall_s


def run_load(
    base_url: str,
    work: Sequence[Work],
    body_of: Callable[[Work], dict[str, Any]],
    concurrency: int,
    timeout_s: float = 600,
) -> LoadResult:
    """Send all work with `concurrency` requests in flight; failed requests are counted."""
    url = urllib.parse.urlsplit(base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    path = url.path.rstrip("/") + COMPLETIONS
    queue = [(item, request_bytes(host, path, body_of(item))) for item in reversed(work)]
    answers: list[tuple[Work, RecordedResponse | Exception]] = []

    async def worker() -> None:
        while queue:
            item, request = queue.pop()
            try:
                answers.append((item, await exchange(host, port, request, timeout_s)))
            except (OSError, TimeoutError) as error:
                answers.append((item, error))

    async def run() -> None:
        await asyncio.gather(*(worker() for _ in range(concurrency)))

    cpu_s, started = _cpu_s(), time.perf_counter()
    asyncio.run(run())
    result = LoadResult(wall_s=time.perf_counter() - started, client_cpu_s=_cpu_s() - cpu_s)
    for item, answer in answers:
        _book(item, answer, result)
    return result


def _book(item: Work, answer: RecordedResponse | Exception, result: LoadResult) -> None:
    """Count one answer as a timing or as a failure."""
    if isinstance(answer, Exception):
        result.failures.append(f"{type(answer).__name__}: {answer}")
        return
    try:
        events = answer.events()
    except ResponseError as error:
        result.failures.append(str(error))
        return
    arrivals = tuple(at_s for at_s, event in events if event.get("choices"))
    if not arrivals:
        result.failures.append("the stream brought no token")
        return
    usage = next((e["usage"] for _, e in reversed(events) if e.get("usage")), {})
    got = usage.get("prompt_tokens"), usage.get("completion_tokens")
    wanted = len(item.prompt), item.num_output
    if got != wanted:
        result.mismatches.append(f"asked for {wanted} tokens of prompt and answer, got {got}")
    result.timings.append(Timing(got[1] or len(arrivals), arrivals))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
