"""The engine as a plain object: schedule, launch, commit. No process, no thread of its own.

Tests, the offline API and the engine process all drive this object. With `overlap`, a step is
committed only after the next one was launched, so that the device never waits for the host:

    host     schedule 1, launch 1 | schedule 2, launch 2, commit 1 | schedule 3, launch 3, commit 2
    device                          computes 1                       computes 2
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
from loraplex_server.engine.runner import Flight, StepRunner


class EngineCore:
    """Used from one thread. Every request given to `add` gets exactly one terminal event.

    Between steps at most one launched step is uncommitted, and without `overlap` none is.

    Args:
        overlap: schedule the next step while the runner computes one; for runners that do not
            compute on the host's cores.
    """

    def __init__(
        self,
        *,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: StepRunner,
        loader: AdapterLoader,
        allocator: PageAllocator,
        residency: AdapterResidency,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool = False,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self._runner = runner
        self._loader = loader
        self._allocator = allocator
        self._residency = residency
        self._clock = clock
        self._overlap = overlap
        self._in_flight: tuple[Plan, Flight] | None = None
        self._num_steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._step_s = 0.0
        self._is_waiting_for_loads = False

    @property
    def has_work(self) -> bool:
        """Some request has not ended yet, or some step or load has not been booked.

        Steps and loads outlive the requests that asked for them.
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
        had_flight = self._in_flight is not None
        if self.scheduler.needs_known_tokens:
            events += self._land()
        plan = self.scheduler.schedule()
        # Before the launch, so that loads start early, and after the launch of the step before:
        # these pages may have been another's until now, and the loader has its copies wait for
        # what was launched by the time of `submit`. This plan touches none of them.
        for load in plan.loads:
            self._loader.submit(load)
        events += self._fly(plan)
        self._is_waiting_for_loads = not plan.sequences and not had_flight
        if not self._is_waiting_for_loads:
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
        """Stop the loader's thread. A step in flight is dropped, with nobody left to tell."""
        self._in_flight = None
        self._loader.close()

    def _book_loads(self, timeout_s: float) -> list[Event]:
        events: list[Event] = []
        for result in self._loader.poll(timeout_s):
            if result.error is None:
                self.scheduler.finish_load(result.adapter_id)
            else:
                events += self.scheduler.fail_load(result.adapter_id, result.error)
        return events

    def _fly(self, plan: Plan) -> list[Event]:
        """Launch a plan, unless it is empty; then commit what may no longer be in flight."""
        launched: tuple[Plan, Flight] | None = None
        if plan.sequences:
            launched = plan, self._runner.launch(plan)
            self.scheduler.advance(plan)
            self._num_steps += 1
            self._prompt_tokens += sum(
                min(step.num_tokens, max(0, step.num_prompt - step.start))
                for step in plan.sequences
            )
        events = self._land()
        self._in_flight = launched
        if not self._overlap:
            events += self._land()
        return events

    def _land(self) -> list[Event]:
        """Wait for the step in flight, if there is one, and commit it."""
        if self._in_flight is None:
            return []
        plan, flight = self._in_flight
        self._in_flight = None
        events = self.scheduler.commit(plan, flight.result())
        self._generated_tokens += sum(isinstance(event, TokenEvent) for event in events)
        return events
