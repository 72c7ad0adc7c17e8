"""Closed and open loops over an engine core in this process: no HTTP, no second process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from workload import Timing, Work

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import Request, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.core import EngineCore


@dataclass
class Answer:
    """What one request got; times in seconds from its submission."""

    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    def timing(self) -> Timing:
        return Timing(len(self.token_ids), tuple(self.token_s))


@dataclass
class Run:
    """One run of a loop: an answer per request, in their order, and the seconds it took."""

    answers: list[Answer]
    wall_s: float

    @property
    def timings(self) -> list[Timing]:
        return [answer.timing() for answer in self.answers]

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / self.wall_s


def requests_of(work: Sequence[Work], manifests: Sequence[AdapterManifest]) -> list[Request]:
    """Return greedy requests of exact length."""
    return [
        Request(
            request_id=f"bench-{i}",
            prompt_token_ids=w.prompt,
            sampling=SamplingParams(max_tokens=w.num_output, temperature=0.0, ignore_eos=True),
            adapter=None if w.adapter is None else manifests[w.adapter],
        )
        for i, w in enumerate(work)
    ]


def closed_loop(core: EngineCore, requests: Sequence[Request], concurrency: int) -> Run:
    """Keep `concurrency` requests in flight until all are done."""
    return _drive(core, requests, lambda _, num_open: num_open < concurrency)


def open_loop(core: EngineCore, requests: Sequence[Request], due_s: Sequence[float]) -> Run:
    """Submit request `i` at `due_s[i]` seconds after the start, however many are open."""
    started = time.monotonic()
    return _drive(core, requests, lambda i, _: time.monotonic() - started >= due_s[i])


def _drive(
    core: EngineCore, requests: Sequence[Request], is_due: Callable[[int, int], bool]
) -> Run:
    answers = [Answer() for _ in requests]
    submitted: dict[str, tuple[Answer, float]] = {}
    num_submitted = num_ended = 0
    started = time.monotonic()
    while num_ended < len(requests):
        while num_submitted < len(requests) and is_due(num_submitted, len(submitted)):
            now = time.monotonic()
            request = replace(requests[num_submitted], arrival_s=now)
            submitted[request.request_id] = answers[num_submitted], now
            num_submitted += 1
            if core.add(request):
                raise SystemExit("the engine refused a request of this benchmark")
        events = core.step(load_timeout_s=0.001) if core.has_work else []
        if not core.has_work and num_submitted < len(requests):
            time.sleep(0.0005)
        now = time.monotonic()
        for event in events:
            answer, since = submitted[event.request_id]
            if not isinstance(event, TokenEvent):
                raise SystemExit(f"a request of this benchmark failed: {event}")
            answer.token_ids.append(event.token.token_id)
            answer.token_s.append(now - since)
            if event.finish_reason is not None:
                del submitted[event.request_id]
                num_ended += 1
    return Run(answers, time.monotonic() - started)
