"""Who runs next, on which pages, with which adapters loaded.

One step is `schedule` (decide), the runner's launch, `advance` (book what was launched), the
runner's result, `commit` (book what was sampled). The next step may be scheduled, launched and
advanced before this one is committed: its sequences then have a token whose id is not known yet.

Who is served first is the waiting queue's to say (`waiting`, `vtc`), how many run together the
admission policy's. Tokens already running go before new ones; when pages run out the newest running
sequence gives its pages back and recomputes what the prefix cache does not keep of it.

Why nobody starves: a sequence never outgrows a pool that is empty but for its adapter. The oldest
running one takes pages from everything idle and from every younger sequence, so it finishes. A
waiting one is overtaken only for a bounded time or while its adapter is on its way: what it will
need then stays set aside, and if its load is undone all the same, nobody overtakes it again.
"""

from __future__ import annotations

from collections.abc import Collection

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.allocator import PageUse
from loraplex_scheduler.admitter import Admitter
from loraplex_scheduler.deadlines import Deadlines
from loraplex_scheduler.draft import StepDraft
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.fit import AdapterLayouts, check_mixture, fitting_len, prefix_of
from loraplex_scheduler.flights import Flight, Flights
from loraplex_scheduler.grower import Grower
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.lookahead import Lookahead
from loraplex_scheduler.overload import Rejection
from loraplex_scheduler.plan import (
    EndEvent,
    Event,
    FinishReason,
    Plan,
    Request,
    StepResult,
    TokenEvent,
)
from loraplex_scheduler.policies import Policies
from loraplex_scheduler.prompt_reading import PromptReading
from loraplex_scheduler.roster import Roster
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.waiting import WaitingQueue


class Scheduler:
    """Owned by the engine step (one thread). Drives the accounts; touches no tensor.

    Always true between calls: a sequence is waiting, running or finishing, see `Roster`.

    Pages change hands in the accounts at once, though launched steps may still read and write them
    for a former owner: a sequence that ended, gave way or has its last token on the way, or an
    adapter that was evicted. That is safe if (1) launched steps run in the order of their launches,
    as on one stream, and (2) a load's copies wait for all steps launched before it was submitted.
    Sequences of one step may share pages that this very step fills. That is safe if (3) a layer
    writes keys and values of all rows before it reads any. Whoever drives this object must see to
    all three.
    """

    def __init__(self, limits: SchedulerLimits, accounts: PoolAccounts, policies: Policies) -> None:
        self.limits = limits
        self.accounts = accounts
        self._policies = policies
        self._page_tokens = accounts.layout.page_tokens
        self._roster = Roster(accounts.residency, policies.queue)
        self._layouts = AdapterLayouts(accounts.layout)
        self._admitter = Admitter(
            limits, accounts, self._roster, policies.admission, policies.clustering
        )
        self._grower = Grower(accounts, self._roster, self._admitter.claims)
        self._lookahead = Lookahead(accounts, self._layouts, limits)
        self._deadlines = Deadlines()
        self._flights = Flights()
        self._drafted: Flight | None = None
        self._next_order = 0
        self.num_rejections = 0

    # ---- state that others read ------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch, those included whose last token is on the way."""
        return len(self._roster.running) + len(self._roster.finishing)

    @property
    def running(self) -> Collection[Sequence]:
        """Sequences that hold pages; not to be changed."""
        return self._roster.running

    @property
    def waiting(self) -> WaitingQueue:
        """Sequences that wait; not to be changed."""
        return self._roster.waiting

    @property
    def num_obtainable(self) -> int:
        """Pages that are free or could be made free by eviction."""
        return self.accounts.num_obtainable()

    @property
    def num_prefix_queries(self) -> int:
        """Tokens of prompts that were looked for in the prefix cache, at first admission."""
        return self._admitter.num_prefix_queries

    @property
    def num_prefix_hits(self) -> int:
        """Those of them that were found there."""
        return self._admitter.num_prefix_hits

    @property
    def num_preemptions(self) -> int:
        """How often a running sequence gave its pages back."""
        return self._grower.num_preemptions

    @property
    def has_work(self) -> bool:
        """A request has not ended, a launched step has not been committed, or a hint is new."""
        return len(self._roster) > 0 or len(self._flights) > 0 or self._lookahead.has_hints

    @property
    def needs_known_tokens(self) -> bool:
        """The launched step must be committed before the next one is scheduled."""
        return any(sequence.needs_known_tokens for sequence in self._roster.historic)

    def is_resident(self, adapter_id: str) -> bool:
        return self.accounts.residency.is_resident(adapter_id)

    def running_adapters(self) -> set[str]:
        return {m.adapter_id for s in self._roster.running for m, _ in s.adapters}

    def waiting_adapters(self) -> set[str]:
        return {m.adapter_id for s in self._roster.waiting for m, _ in s.adapters}

    # ---- requests come and go --------------------------------------------------------------

    def add(self, request: Request) -> list[Event]:
        """Queue a request, or return its terminal event if it cannot be served in time.

        Raises:
            RequestRefused: it could not run even alone; nothing was queued.
        """
        self.accounts.clock.set(request.arrival_s)
        if self._roster.get(request.request_id) is not None:
            raise RequestRefused(reason=f"request id {request.request_id} is in use")
        sequence = self._sequence(request)
        now = self.accounts.clock.now_s
        for manifest, _ in request.adapters:
            self.accounts.residency.expect(manifest.adapter_id)
            self._lookahead.arrive(manifest)
        rejection = self._policies.overload.refuse(sequence, self, now)
        if rejection is not None:
            return [self._rejected(request.request_id, rejection)]
        self._roster.add(sequence)
        self._deadlines.add(sequence)
        for manifest, _ in request.adapters:
            self.accounts.residency.keep(manifest.adapter_id)
        return []

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
        self._end(sequence)
        return [EndEvent(request_id, reason, message)]

    def expire(self, now: float) -> list[Event]:
        """End every request whose deadline has passed."""
        self.accounts.clock.set(now)
        self._deadlines.forget_ended(len(self._roster))
        message = "the request did not finish before its deadline"
        late = self._deadlines.pop_late(now)
        return [e for s in late for e in self.abort(s.request_id, FinishReason.TIMED_OUT, message)]

    def drop_hopeless(self, now: float) -> list[Event]:
        """End every waiting request whose promise of a first token cannot be kept any more."""
        events: list[Event] = []
        for sequence, rejection in self._policies.overload.drop(self, now):
            self._end(sequence)
            events.append(self._rejected(sequence.request_id, rejection))
        return events

    def finish_load(self, adapter_id: str, took_s: float = 0.0) -> None:
        """The adapter's weights are in its pages; its sequences may run.

        Args:
            took_s: seconds the load took; 0 if that is not known.
        """
        residency = self.accounts.residency
        if took_s > 0:
            self._policies.times.observe_load(len(residency.pages(adapter_id)), took_s)
        residency.finish_load(adapter_id)

    def fail_load(self, adapter_id: str, message: str) -> list[Event]:
        """The adapter cannot be loaded: its waiting requests fail, everyone else goes on."""
        self.accounts.residency.fail_load(adapter_id)
        self._lookahead.forget(adapter_id)
        waiting = [s.request_id for s in self._roster.waiting if s.uses(adapter_id)]
        return [e for i in waiting for e in self.abort(i, FinishReason.FAILED, message)]

    def prefetch(self, manifest: AdapterManifest) -> None:
        """Somebody says that the adapter will be asked for soon, which counts as asking once."""
        self.accounts.residency.expect(manifest.adapter_id)
        self._lookahead.hint(manifest)

    def discard_adapter(self, adapter_id: str) -> None:
        """Free the adapter's pages, or do nothing while a live request names it.

        Pages of an adapter that is still loading go back when the load has ended.
        """
        self._lookahead.forget(adapter_id)
        if not any(s.uses(adapter_id) for s in self._roster):
            self.accounts.discard_adapter(adapter_id)

    def keep_adapters(self, adapter_ids: frozenset[str]) -> None:
        """From now on, evict these only where a request could not run otherwise."""
        self.accounts.residency.kept = adapter_ids

    # ---- the step --------------------------------------------------------------------------

    def schedule(self, now: float) -> Plan:
        """Decide one step. The pages and pins of the plan are taken when this returns.

        At most one launched step may be uncommitted, and none while `needs_known_tokens`. The plan
        must be launched and advanced before anything else is asked of the scheduler, or, when it
        has no sequences, be dropped.
        """
        assert len(self._flights) <= 1, "two steps are in flight"
        self.accounts.clock.set(now)
        draft = StepDraft(self.limits.max_step_tokens)
        batching = self._policies.batching
        may_admit = batching.may_admit(len(self._roster.running))
        if batching.is_mixed or not may_admit:
            self._grower.continue_running(draft)
        num_running = len(draft)
        loads, behind = self._admitter.admit(draft, now) if may_admit else ([], [])
        has_admitted = len(draft) > num_running
        if not batching.is_mixed and may_admit and not has_admitted:
            self._grower.continue_running(draft)
        if draft:
            batching.launched(has_admitted=has_admitted)
        guesses = self._lookahead.guesses(behind)
        guess = self._lookahead.try_begin_load(self._roster.running)
        if guess is not None:
            loads.append(guess)
        self._drafted = draft.flight(loads, guesses)
        return self._drafted.plan

    def advance(self, plan: Plan) -> None:
        """Book that a plan was launched; whoever's last token it samples leaves the batch now."""
        flight = self._drafted
        assert flight is not None, "nothing was scheduled"
        assert flight.plan is plan, "another plan was scheduled since"
        self._drafted = None
        for step, sequence in zip(plan.sequences, flight.sequences, strict=True):
            sequence.advance(step)
            if sequence.num_tokens >= sequence.last_len:
                self._roster.finish(sequence)
        self._flights.start(flight)

    def commit(
        self,
        plan: Plan,
        result: StepResult,
        took_s: float | None = None,
        now: float | None = None,
    ) -> list[Event]:
        """Book the result of the step launched longest ago.

        Sequences that ended meanwhile are passed over; those that gave way meanwhile get their
        token where they wait.

        Args:
            took_s: seconds that the step took of the device's time; None if that is not known.
            now: when the result was there; None for the time that was told last.
        """
        if now is not None:
            self.accounts.clock.set(now)
        flight = self._flights.land(plan)
        if took_s is not None:
            self._policies.times.observe_step(flight.load, took_s)
        events: list[Event] = []
        sampled: list[Sequence] = []
        tokens, failures, dead_ends = result.tokens, result.failures, result.dead_ends
        page_tokens = self._page_tokens
        for step, sequence in zip(plan.sequences, flight.sequences, strict=True):
            if not sequence.is_live:
                continue
            request_id = sequence.request_id
            if failures and request_id in failures:
                events += self.abort(request_id, FinishReason.FAILED, failures[request_id])
                # What made it fail may lie in pages that others would find.
                self.accounts.prefixes.drop_adapter(sequence.adapter_id)
                continue
            if dead_ends and request_id in dead_ends:
                events += self.abort(request_id, FinishReason.REFUSED, dead_ends[request_id])
                continue
            if sequence.reading is not None:
                events += sequence.reading.take(step, result)
                if step.is_sampled and sequence.request.pooling is not None:
                    events.append(self._embedded(sequence, sequence.reading, result))
                    continue
            if step.is_sampled:
                sampled.append(sequence)
                token = tokens[request_id]
                reason = sequence.append(token.token_id)
                if reason is not None:
                    self._policies.admission.ended(sequence)
                    self._end(sequence)
                elif sequence.num_computed % page_tokens == 0 and sequence.table.pages:
                    sequence.publish_computed()
                is_first = len(sequence.token_ids) == sequence.num_prompt + 1
                if is_first:
                    times = sequence.start_times(self.accounts.clock.now_s)
                    cached = sequence.num_cached_text
                    events.append(TokenEvent(request_id, token, reason, cached, times))
                else:
                    events.append(TokenEvent(request_id, token, reason))
        self._roster.waiting.charge_outputs(sampled)
        return events

    def check(self) -> None:
        """Raise AssertionError if any account is off; cheap enough for tests to call each step."""
        self.accounts.check()
        self._roster.check()
        for sequence in self._roster:
            num_awaited = self._flights.num_awaited(sequence)
            assert sequence.num_awaited == num_awaited, "a token is lost or awaited in vain"
        num_private = sum(len(s.table.pages) - s.table.num_shared for s in self._roster)
        assert num_private == self.accounts.allocator.num_held(PageUse.KV), "KV pages leaked"

    # ---- one sequence ----------------------------------------------------------------------

    def _sequence(self, request: Request) -> Sequence:
        check_mixture(request)
        layouts = tuple(self._layouts.of(manifest) for manifest, _ in request.adapters)
        num_pages = self.accounts.allocator.num_pages
        max_len = fitting_len(request, layouts, self.limits, self.accounts.layout, num_pages)
        table = self.accounts.new_table(*prefix_of(request), request.prefix_salt)
        self._next_order += 1
        eos_token_ids = self.limits.eos_token_ids
        return Sequence(request, self._next_order, table, layouts, max_len, eos_token_ids)

    def _embedded(self, sequence: Sequence, reading: PromptReading, result: StepResult) -> EndEvent:
        """End a sequence whose prompt is computed and that wants nothing else."""
        self._end(sequence)
        return EndEvent(
            sequence.request_id,
            FinishReason.STOP,
            embedding=reading.embedding(result),
            times=sequence.start_times(self.accounts.clock.now_s),
        )

    def _end(self, sequence: Sequence) -> None:
        self._roster.remove(sequence)
        # Those that were loaded for somebody who still waits are of use.
        self.accounts.drop_unused(self._admitter.claims.keys() | self.accounts.residency.kept)

    def _rejected(self, request_id: str, rejection: Rejection) -> EndEvent:
        if rejection.retry_after_s is None:
            return EndEvent(request_id, FinishReason.REFUSED, rejection.message)
        self.num_rejections += 1
        return EndEvent(
            request_id, FinishReason.REJECTED, rejection.message, rejection.retry_after_s
        )
