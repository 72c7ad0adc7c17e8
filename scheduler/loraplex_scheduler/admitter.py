"""Letting waiting sequences run: pages, adapters, and who is passed over meanwhile.

Sequences are taken in the queue's order of service. One whose adapter is on its way is passed over,
so that others do not wait for its disk, and what it will need then stays set aside. One that lacks
pages is not passed over: smaller ones behind it would starve it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.residency import ResidencyState
from loraplex_scheduler.admission import AdmissionPolicy
from loraplex_scheduler.clustering import ClusteringPolicy
from loraplex_scheduler.draft import StepDraft
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import AdapterLoad
from loraplex_scheduler.roster import Roster
from loraplex_scheduler.sequence import Sequence

#: Waiting sequences that a step passes over at most: enough to keep the loader and the batch busy.
_MAX_PASSED: Final = 32

#: Waiting sequences behind those whose adapters are worth bringing into host memory.
_LOOKAHEAD: Final = 32


class Admitter:
    """Owned by the scheduler.

    Attributes:
        claims: adapters that were loaded, or are being loaded, for a sequence that still waits, and
            that sequence. Those who run evict them last. If it comes to that, the sequence is not
            passed over a second time: nobody is admitted before it, so those who run come to an
            end and nobody can undo its load for ever.
        num_prefix_queries, num_prefix_hits: tokens of prompts at their first admission, and those
            of them that were found in the prefix cache.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        accounts: PoolAccounts,
        roster: Roster,
        admission: AdmissionPolicy,
        clustering: ClusteringPolicy,
    ) -> None:
        self._limits = limits
        self._accounts = accounts
        self._roster = roster
        self._admission = admission
        self._clustering = clustering
        self.claims: dict[str, Sequence] = {}
        self._undone: set[Sequence] = set()
        self._spared: set[str] = set()
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._num_set_aside = 0

    def _drop_claims(self) -> None:
        """Forget the claims of sequences that wait no more; note whose load was undone."""
        residency, waiting = self._accounts.residency, self._roster.waiting
        self._undone = {sequence for sequence in self._undone if sequence in waiting}
        for adapter_id, sequence in list(self.claims.items()):
            if sequence not in waiting:
                del self.claims[adapter_id]
            elif residency.state(adapter_id) is None:
                del self.claims[adapter_id]
                self._undone.add(sequence)

    def admit(
        self, draft: StepDraft, now: float
    ) -> tuple[list[AdapterLoad], list[AdapterManifest]]:
        """Put newcomers into the draft.

        Returns:
            The loads that waiting sequences need; and while nothing is being loaded, the adapters
            of those behind.
        """
        self._drop_claims()
        self._spared = set()
        self._num_set_aside = 0
        loads: list[AdapterLoad] = []
        if not self._roster.waiting:
            return loads, []
        running, residency = self._roster.running, self._accounts.residency
        self._admission.begin(running)
        self._clustering.begin(running, now)
        queue = self._roster.waiting.in_order()
        num_passed = 0
        for sequence in queue:
            if draft.budget == 0 or num_passed == _MAX_PASSED:
                break
            if running or residency.num_loading:
                # What is to be kept gives way only to a sequence that could not run alone.
                self._spared |= residency.kept
            if self._is_passed_over(sequence, loads):
                num_passed += 1
            elif len(running) >= self._limits.max_running or not self._try_admit(sequence, draft):
                break
        is_idle = not residency.num_loading
        return loads, self._behind(queue) if is_idle else []

    def _is_passed_over(self, sequence: Sequence, loads: list[AdapterLoad]) -> bool:
        """Whether others may go before it, as it waits for its adapters or for better company."""
        residency = self._accounts.residency
        is_complete = True
        sequence.end_load_wait(self._accounts.clock.now_s)
        for manifest, layout in sequence.adapters:
            state = residency.state(manifest.adapter_id)
            self._spared.add(manifest.adapter_id)  # whoever comes later may not evict it
            if state is ResidencyState.RESIDENT:
                continue
            is_complete = False
            if state is None:
                if residency.num_loading >= self._limits.max_loading:
                    return True
                if not self._try_load(sequence, manifest, layout, loads):
                    return False
        if is_complete:
            return not self._clustering.may_join(sequence)
        if sequence.started_s is None:
            sequence.wait_for_load(self._accounts.clock.now_s)
        self._num_set_aside += sequence.table.pages_missing(sequence.num_tokens)
        return sequence not in self._undone

    def _try_load(
        self,
        sequence: Sequence,
        manifest: AdapterManifest,
        layout: AdapterLayout,
        loads: list[AdapterLoad],
    ) -> bool:
        """Start a load it needs; False, and nothing has changed, when there is no room for it."""
        residency = self._accounts.residency
        # What will be pinned or written when it runs must be there beside what runs already. And
        # its own pages are counted in what it leaves: those who run use them in the meantime.
        num_own = sequence.table.pages_missing(sequence.num_tokens)
        num_pages = layout.num_pages + num_own + self._num_set_aside
        if not self._admission.is_enough(self._num_obtainable() - num_pages, sequence):
            return False
        self._accounts.try_make_free(layout.num_pages, self._spared)
        pages = residency.begin_load(manifest.adapter_id, layout.num_pages)
        self.claims[manifest.adapter_id] = sequence
        loads.append(AdapterLoad(manifest, layout, pages))
        return True

    def _try_admit(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Let it run, or change nothing and return False."""
        residency = self._accounts.residency
        if not all(residency.is_resident(manifest.adapter_id) for manifest, _ in sequence.adapters):
            return False
        table = sequence.table
        found = table.match(sequence.token_ids, sequence.max_cached)
        num_own = table.pages_missing(sequence.num_tokens) - self._pages_of(found.num_tokens)
        num_left = self._num_obtainable() - found.num_idle_pages - num_own - self._num_set_aside
        if not self._admission.is_enough(num_left, sequence):
            return False
        sequence.num_computed = table.adopt(sequence.token_ids, sequence.max_cached)
        self._accounts.try_make_free(num_own, self._spared)
        table.grow(sequence.num_tokens)
        self._start(sequence, draft)
        return True

    def _start(self, sequence: Sequence, draft: StepDraft) -> None:
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.num_prefix_queries += sequence.num_prompt
            self.num_prefix_hits += sequence.num_cached
            sequence.started_s = self._accounts.clock.now_s
        self._roster.admit(sequence)
        self._roster.waiting.charge_prompt(sequence, sequence.num_pending)
        self._admission.admitted(sequence)
        self._clustering.admitted(sequence)
        num_tokens = min(sequence.num_pending, draft.budget)
        step = sequence.step(num_tokens)
        draft.put(sequence, step)
        sequence.publish_drafted(step)

    def _num_obtainable(self) -> int:
        """Pages that are free, or would be if all idle ones but the spared adapters' were."""
        return self._accounts.num_obtainable(self._spared)

    def _pages_of(self, num_tokens: int) -> int:
        return self._accounts.layout.pages_for_tokens(num_tokens)

    def _behind(self, queue: Iterator[Sequence]) -> list[AdapterManifest]:
        """Return the adapters of the next sequences in the queue, as a hint for host memory."""
        return [manifest for s in islice(queue, _LOOKAHEAD) for manifest, _ in s.adapters]
