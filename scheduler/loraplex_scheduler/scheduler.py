"""Who runs next, on which pages, with which adapters loaded.

One step is `schedule` (decide), the runner's launch, `advance` (book what was launched), the
runner's result, `commit` (book what was sampled). The next step may be scheduled, launched and
advanced before this one is committed: its sequences then have a token whose id is not known yet.

Service is first come, first served; tokens already running go before new ones; when pages run out
the newest running sequence gives its pages back and recomputes later.

Why nobody starves: a sequence never outgrows a pool that is empty but for its adapter. The oldest
running one takes pages from every idle adapter and every younger sequence, so it finishes. A
waiting one is overtaken only while its adapter is on its way: what it will need stays set aside,
and no younger sequence may evict the adapter it waits for.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from weakref import WeakValueDictionary

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.layout import PoolLayout
from loraplex_memory.page_table import PageTable
from loraplex_memory.residency import AdapterResidency, ResidencyState
from loraplex_scheduler.draft import StepDraft
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.flights import Flights
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import (
    AdapterLoad,
    EndEvent,
    Event,
    FinishReason,
    Plan,
    PlannedAdapter,
    Request,
    SampledToken,
    SequenceStep,
    StepResult,
    TokenEvent,
)
from loraplex_scheduler.roster import Roster
from loraplex_scheduler.sequence import Sequence


class Scheduler:
    """Owned by the engine step (one thread). Drives the accounts; touches no tensor.

    Always true between calls: a sequence is waiting, running or finishing, see `Roster`.

    Pages change hands in the accounts at once, though launched steps may still read and write them
    for a former owner: a sequence that ended, gave way or has its last token on the way, or an
    adapter that was evicted. That is safe if (1) launched steps run in the order of their launches,
    as on one stream, and (2) a load's copies wait for all steps launched before it was submitted.
    Whoever drives this object must see to both.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        layout: PoolLayout,
        allocator: PageAllocator,
        residency: AdapterResidency,
    ) -> None:
        self.limits = limits
        self._layout = layout
        self._allocator = allocator
        self._residency = residency
        self._roster = Roster(residency)
        self._flights = Flights()
        # Offsets depend on content alone, so sequences of one adapter share them while they live.
        self._layouts: WeakValueDictionary[str, AdapterLayout] = WeakValueDictionary()
        self._next_order = 0
        self.num_preemptions = 0
        self.num_evictions = 0

    # ---- state that others read ------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch, those included whose last token is on the way."""
        return len(self._roster.running) + len(self._roster.finishing)

    @property
    def has_work(self) -> bool:
        """A request has not ended, or a launched step has not been committed."""
        return len(self._roster) > 0 or len(self._flights) > 0

    @property
    def needs_known_tokens(self) -> bool:
        """The launched step must be committed before the next one is scheduled."""
        return any(sequence.needs_known_tokens for sequence in self._roster.running)

    def running_adapters(self) -> set[str]:
        return {s.adapter_id for s in self._roster.running if s.adapter_id}

    def waiting_adapters(self) -> set[str]:
        return {s.adapter_id for s in self._roster.waiting if s.adapter_id}

    # ---- requests come and go --------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestRefused: it could not run even alone; nothing was queued.
        """
        if self._roster.get(request.request_id) is not None:
            raise RequestRefused(reason=f"request id {request.request_id} is in use")
        adapter_layout = self._adapter_layout(request.adapter)
        max_len = self._max_len(request, adapter_layout)
        table = PageTable(self._allocator, self._layout.page_tokens)
        sequence = Sequence(request, self._next_order, table, adapter_layout, max_len)
        self._next_order += 1
        self._roster.add(sequence)
        if sequence.adapter_id:
            self._residency.keep(sequence.adapter_id)

    def abort(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.CANCELLED,
        message: str = "",
    ) -> list[Event]:
        """End a request now, between steps; no event when it has ended already."""
        sequence = self._roster.get(request_id)
        if sequence is None:
            return []
        self._roster.remove(sequence)
        return [EndEvent(request_id, reason, message)]

    def expire(self, now: float) -> list[Event]:
        """End every request whose deadline has passed."""
        late = [
            sequence.request_id
            for sequence in self._roster
            if (deadline := sequence.request.deadline_s) is not None and deadline <= now
        ]
        message = "the request did not finish before its deadline"
        return [e for i in late for e in self.abort(i, FinishReason.TIMED_OUT, message)]

    def finish_load(self, adapter_id: str) -> None:
        """The adapter's weights are in its pages; its sequences may run."""
        self._residency.finish_load(adapter_id)

    def fail_load(self, adapter_id: str, message: str) -> list[Event]:
        """The adapter cannot be loaded: its waiting requests fail, everyone else goes on."""
        self._residency.fail_load(adapter_id)
        waiting = [s.request_id for s in self._roster.waiting if s.adapter_id == adapter_id]
        return [e for i in waiting for e in self.abort(i, FinishReason.FAILED, message)]

    def discard_adapter(self, adapter_id: str) -> None:
        """Free the adapter's pages, or do nothing while a live request names it.

        Pages of an adapter that is still loading go back when the load has ended.
        """
        if all(s.adapter_id != adapter_id for s in self._roster):
            self._residency.discard(adapter_id)

    # ---- the step --------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Decide one step. The pages and pins of the plan are taken when this returns.

        At most one launched step may be uncommitted, and none while `needs_known_tokens`. The plan
        must be launched and advanced before anything else is asked of the scheduler, or, when it
        has no sequences, be dropped.
        """
        assert len(self._flights) <= 1, "two steps are in flight"
        draft = StepDraft(self.limits.max_step_tokens)
        self._continue_running(draft)
        loads = self._admit_waiting(draft)
        steps = draft.in_order()
        return Plan(
            sequences=tuple(steps), loads=tuple(loads), adapters=self._planned_adapters(steps)
        )

    def advance(self, plan: Plan) -> None:
        """Book that a plan was launched; whoever's last token it samples leaves the batch now."""
        sequences = []
        for step in plan.sequences:
            sequence = self._roster.get(step.request_id)
            assert sequence is not None, "a request ended between schedule and advance"
            sequence.advance(step)
            if sequence.is_complete:
                self._roster.finish(sequence)
            sequences.append(sequence)
        self._flights.start(plan, tuple(sequences))

    def commit(self, plan: Plan, result: StepResult) -> list[Event]:
        """Book the result of the step launched longest ago.

        Sequences that ended meanwhile are passed over; those that gave way meanwhile get their
        token where they wait.
        """
        events: list[Event] = []
        for step, sequence in self._flights.land(plan):
            if self._roster.get(step.request_id) is not sequence:
                continue
            if step.request_id in result.failures:
                message = result.failures[step.request_id]
                events += self.abort(step.request_id, FinishReason.FAILED, message)
            elif step.is_sampled:
                events.append(self._append(sequence, result.tokens[step.request_id]))
        return events

    def check(self) -> None:
        """Raise AssertionError if any account is off; cheap enough for tests to call each step."""
        self._allocator.check()
        self._residency.check()
        self._roster.check()
        for sequence in self._roster:
            num_awaited = self._flights.num_awaited(sequence)
            assert sequence.num_awaited == num_awaited, "a token is lost or awaited in vain"
        pages = sum(len(s.table.pages) for s in self._roster)
        assert pages == self._allocator.num_held(PageUse.KV), "KV pages leaked"

    # ---- deciding --------------------------------------------------------------------------

    def _continue_running(self, draft: StepDraft) -> None:
        """Plan the running sequences, decodes before longer catch-ups, each by age."""
        for sequence in sorted(self._roster.running, key=lambda s: s.num_pending > 1):
            num_tokens = min(sequence.num_pending, draft.budget)
            if num_tokens == 0 or not sequence.table.pages:  # preempted in this very loop
                continue
            if self._grow(sequence, sequence.num_computed + num_tokens, draft):
                draft.put(sequence.step(num_tokens, self.limits.eos_token_ids))

    def _grow(self, sequence: Sequence, num_tokens: int, draft: StepDraft) -> bool:
        """Find pages for a running sequence: idle adapters first, then younger sequences.

        Returns False when it must sit this step out: it was the youngest and gave way, or pages
        are held by adapters that are still loading.
        """
        while (missing := sequence.table.pages_missing(num_tokens)) > self._allocator.num_free:
            awaited = self._roster.adapters_awaited_before(sequence)
            if self._evict(missing - self._allocator.num_free, awaited):
                continue
            victim = self._roster.running[-1]
            if victim is sequence and len(self._roster.running) == 1 and not awaited:
                return False
            self._roster.preempt(victim)
            self.num_preemptions += 1
            draft.drop(victim.request_id)
            if victim is sequence:
                return False
        sequence.table.grow(num_tokens)
        return True

    def _admit_waiting(self, draft: StepDraft) -> list[AdapterLoad]:
        """Admit waiting sequences in order; start the loads that the next ones need.

        A sequence whose adapter is loading is passed over, so that others do not wait for its disk;
        the pages it will need are set aside. One that lacks pages is not passed over: smaller ones
        behind it would starve it.
        """
        loads: list[AdapterLoad] = []
        awaited: set[str] = set()
        num_passed = num_set_aside = 0
        for sequence in list(self._roster.waiting):
            if (
                draft.budget == 0
                or len(self._roster.running) + num_passed >= self.limits.max_running
            ):
                break
            missing = sequence.table.pages_missing(sequence.num_tokens)
            if sequence.adapter_id and not self._residency.is_resident(sequence.adapter_id):
                if not self._await_adapter(sequence, awaited, num_set_aside, loads):
                    break
                num_passed += 1
                num_set_aside += missing
                continue
            if not self._admit(sequence, missing + num_set_aside, awaited):
                break
            num_tokens = min(sequence.num_pending, draft.budget)
            draft.put(sequence.step(num_tokens, self.limits.eos_token_ids))
        return loads

    def _await_adapter(
        self,
        sequence: Sequence,
        awaited: set[str],
        num_set_aside: int,
        loads: list[AdapterLoad],
    ) -> bool:
        """See to it that the sequence's adapter is on its way; False when there is no room yet."""
        manifest, layout = sequence.request.adapter, sequence.adapter_layout
        assert manifest is not None
        assert layout is not None
        awaited.add(manifest.adapter_id)
        if self._residency.state(manifest.adapter_id) is ResidencyState.LOADING:
            return True
        if self._residency.num_loading >= self.limits.max_loading:
            return True
        if not self._make_free(layout.num_pages + num_set_aside + self._headroom(), awaited):
            return False
        pages = self._residency.begin_load(manifest.adapter_id, layout.num_pages)
        loads.append(AdapterLoad(manifest, layout, pages))
        return True

    def _admit(self, sequence: Sequence, num_pages: int, awaited: AbstractSet[str]) -> bool:
        """Give a waiting sequence pages for all its tokens and pin its adapter.

        Returns False, changing nothing, unless `num_pages` and some headroom can be had.
        """
        spared = {*awaited, sequence.adapter_id} if sequence.adapter_id else awaited
        if not self._make_free(num_pages + self._headroom(), spared):
            return False
        self._roster.admit(sequence)
        return True

    def _headroom(self) -> int:
        """Pages left to the running sequences, or their next tokens would preempt a newcomer."""
        return len(self._roster.running)

    def _make_free(self, num_pages: int, spared: AbstractSet[str]) -> bool:
        """Evict idle adapters until `num_pages` are free, or change nothing and return False."""
        missing = num_pages - self._allocator.num_free
        if missing <= 0:
            return True
        if self._residency.num_evictable_pages(spared) < missing:
            return False
        self._evict(missing, spared)
        return True

    def _evict(self, num_pages: int, spared: AbstractSet[str] = frozenset()) -> bool:
        evicted = self._residency.evict_idle(num_pages, spared)
        self.num_evictions += len(evicted)
        return bool(evicted)

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        sequence.append(token.token_id)
        reason = sequence.finish_reason(self.limits.eos_token_ids)
        if reason is not None:
            self._roster.remove(sequence)
        return TokenEvent(sequence.request_id, token, reason)

    # ---- small answers ---------------------------------------------------------------------

    def _planned_adapters(self, steps: list[SequenceStep]) -> dict[str, PlannedAdapter]:
        planned: dict[str, PlannedAdapter] = {}
        for step in steps:
            if step.adapter_id and step.adapter_id not in planned:
                layout = self._layouts[step.adapter_id]
                planned[step.adapter_id] = PlannedAdapter(
                    layout, self._residency.pages(step.adapter_id)
                )
        return planned

    def _adapter_layout(self, manifest: AdapterManifest | None) -> AdapterLayout | None:
        if manifest is None:
            return None
        layout = self._layouts.get(manifest.adapter_id)
        if layout is None:
            layout = AdapterLayout(self._layout, manifest.ranks)
            self._layouts[manifest.adapter_id] = layout
        return layout

    def _max_len(self, request: Request, adapter_layout: AdapterLayout | None) -> int:
        """Return the most tokens the sequence may have: the model's limit, or what the pool holds
        beside its adapter.

        Raises:
            RequestRefused: there is no room for the prompt and one token.
        """
        num_prompt = len(request.prompt_token_ids)
        num_adapter = adapter_layout.num_pages if adapter_layout else 0
        in_pool = (self._allocator.num_pages - num_adapter) * self._layout.page_tokens
        max_len = min(self.limits.max_model_len, in_pool)
        if num_prompt == 0:
            raise RequestRefused(reason="the prompt is empty", param="prompt")
        if num_prompt < max_len:
            return max_len
        limit = f"the model's limit is {self.limits.max_model_len}"
        if in_pool < self.limits.max_model_len:
            limit = (
                f"the pool of {self._allocator.num_pages} pages holds {max(0, in_pool)} beside "
                f"the adapter's {num_adapter} pages: serve with a larger pool"
            )
        raise RequestRefused(
            reason=f"the prompt has {num_prompt} tokens and needs room for one more; {limit}",
            param="prompt",
        )
