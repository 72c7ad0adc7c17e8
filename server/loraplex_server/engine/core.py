"""The engine as a plain object: schedule, run, commit. No process, no thread of its own.

Tests, the offline API and the engine process all drive this object.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.residency import AdapterResidency
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Plan, Request, TokenEvent
from loraplex_scheduler.scheduler import Scheduler
from loraplex_server.engine.loader import AdapterLoader
from loraplex_server.engine.messages import EngineInfo, EngineStats
from loraplex_server.engine.runner import Runner


class EngineCore:
    """Used from one thread. Every request given to `add` gets exactly one terminal event."""

    def __init__(
        self,
        *,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: Runner,
        loader: AdapterLoader,
        allocator: PageAllocator,
        residency: AdapterResidency,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self._runner = runner
        self._loader = loader
        self._allocator = allocator
        self._residency = residency
        self._clock = clock
        self._num_steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._step_s = 0.0
        self._is_waiting_for_loads = False

    @property
    def has_work(self) -> bool:
        """Some request has not ended yet, or some load has not been booked.

        A load outlives the requests that asked for it.
        """
        return self.scheduler.has_work or self._loader.num_outstanding > 0

    @property
    def is_waiting_for_loads(self) -> bool:
        """The last step had nothing to compute: only a load, a command or time can change that."""
        return self._is_waiting_for_loads

    def add(self, request: Request) -> list[Event]:
        """Accept a request, or return its terminal event when it can never run."""
        try:
            self.scheduler.add(request)
        except RequestRefused as error:
            return [EndEvent(request.request_id, FinishReason.REFUSED, error.reason)]
        return []

    def abort(self, request_id: str) -> list[Event]:
        return self.scheduler.abort(request_id)

    def discard_adapter(self, adapter_id: str) -> None:
        self.scheduler.discard_adapter(adapter_id)

    def step(self, load_timeout_s: float = 0.0) -> list[Event]:
        """Run one step and return what happened.

        Args:
            load_timeout_s: when nothing can be computed before an adapter is loaded, wait so long
                for it. 0 returns at once.
        """
        started = self._clock()
        events = self.scheduler.expire(started)
        events += self._book_loads(load_timeout_s if self._is_waiting_for_loads else 0.0)
        plan = self.scheduler.schedule()
        for load in plan.loads:
            self._loader.submit(load)
        self._is_waiting_for_loads = not plan.sequences
        if plan.sequences:
            events += self._compute(plan)
            self._step_s += self._clock() - started
        return events

    def stats(self) -> EngineStats:
        """Return a snapshot for metrics and for the pool's map."""
        residency, scheduler = self._residency, self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            pages_kv=self._allocator.num_held(PageUse.KV),
            pages_adapters=self._allocator.num_held(PageUse.ADAPTER),
            pages_free=self._allocator.num_free,
            resident={i: len(residency.pages(i)) for i in residency.resident_ids()},
            loading=tuple(residency.loading_ids()),
            running_adapters=tuple(sorted(scheduler.running_adapters())),
            waiting_adapters=tuple(sorted(scheduler.waiting_adapters())),
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_loads=self._loader.num_loads,
            num_load_failures=self._loader.num_failures,
            num_evictions=scheduler.num_evictions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            step_s=self._step_s,
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant of the accounts is broken."""
        self.scheduler.check()

    def close(self) -> None:
        """Stop the loader's thread."""
        self._loader.close()

    def _book_loads(self, timeout_s: float) -> list[Event]:
        events: list[Event] = []
        for result in self._loader.poll(timeout_s):
            if result.error is None:
                self.scheduler.finish_load(result.adapter_id)
            else:
                events += self.scheduler.fail_load(result.adapter_id, result.error)
        return events

    def _compute(self, plan: Plan) -> list[Event]:
        result = self._runner.run(plan)
        events = self.scheduler.commit(plan, result)
        self._num_steps += 1
        self._prompt_tokens += sum(
            min(len(step.token_ids), max(0, step.num_prompt - step.start))
            for step in plan.sequences
        )
        self._generated_tokens += sum(isinstance(event, TokenEvent) for event in events)
        return events
