"""Letting running sequences go on: their part of a step, and the pages that it needs."""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_memory.accounts import PoolAccounts
from loraplex_scheduler.draft import StepDraft
from loraplex_scheduler.roster import Roster
from loraplex_scheduler.sequence import Sequence


class Grower:
    """Owned by the scheduler.

    Attributes:
        num_preemptions: how often a running sequence gave its pages back.
    """

    def __init__(
        self, accounts: PoolAccounts, roster: Roster, claims: Mapping[str, Sequence]
    ) -> None:
        """Args:
        claims: see `Admitter`; seen as it is at each step.
        """
        self._accounts = accounts
        self._roster = roster
        self._claims = claims
        self._page_tokens = accounts.layout.page_tokens
        self.num_preemptions = 0

    def continue_running(self, draft: StepDraft) -> None:
        """Plan the running sequences, decodes before longer catch-ups, each by age."""
        running = self._roster.running
        decoding = [s for s in running if s.num_tokens - s.num_computed == 1]
        catching_up = [s for s in running if s.num_tokens - s.num_computed > 1]
        draft.put_decodes(self._grow_decoding(decoding, draft))
        for sequence in catching_up:
            num_tokens = min(sequence.num_pending, draft.budget)
            stop = sequence.num_computed + num_tokens
            if num_tokens > 0 and self._grow(sequence, stop, draft):
                draft.put(sequence, sequence.step(num_tokens))
        for sequence, step in draft.longer():
            sequence.publish_drafted(step)

    def _grow_decoding(self, decoding: list[Sequence], draft: StepDraft) -> list[Sequence]:
        """Find a page for each that needs one for its next token; return who has room for it."""
        page_tokens = self._page_tokens
        short = [s for s in decoding if s.num_tokens > len(s.table.pages) * page_tokens]
        spared = self._claims.keys() | self._accounts.residency.kept
        if self._accounts.try_make_free(len(short), spared):
            for sequence in short:
                sequence.table.grow(sequence.num_tokens)
            return decoding
        for sequence in short:
            self._grow(sequence, sequence.num_tokens, draft)
        return [s for s in decoding if s.num_tokens <= s.table.capacity]

    def _grow(self, sequence: Sequence, num_tokens: int, draft: StepDraft) -> bool:
        """Find pages for a running sequence: idle ones first, then younger sequences'.

        Returns False when it must sit this step out: it was preempted in this very step, it was
        the youngest and gave way, or pages are held by adapters that are still loading.
        """
        if not sequence.table.pages:
            return False
        claimed, kept = self._claims.keys(), self._accounts.residency.kept
        running = self._roster.running
        num_pages = sequence.table.pages_missing(num_tokens)
        while not (
            self._accounts.try_make_free(num_pages, claimed | kept)
            or self._accounts.try_make_free(num_pages, kept)
        ):
            victim = running[-1]
            if victim is sequence and len(running) == 1:
                if self._accounts.try_make_free(num_pages):
                    break
                return False  # loads hold the rest, and will end
            self._roster.preempt(victim)
            self.num_preemptions += 1
            draft.drop(victim)
            if victim is sequence:
                return False
        sequence.table.grow(num_tokens)
        return True
