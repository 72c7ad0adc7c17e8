"""Sequences outside a scheduler, for policies that only look at them."""

from __future__ import annotations

from itertools import count

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_scheduler.plan import Request
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.sequence import Sequence
from tests.support.scheduling import PLAIN, make_accounts, make_manifest, make_request


class SequenceFactory:
    """Makes sequences of one pool, in the order of their arrival."""

    def __init__(
        self, num_pages: int = 4096, *, page_tokens: int = 4, choice: PolicyChoice = PLAIN
    ) -> None:
        self.accounts = make_accounts(num_pages, page_tokens=page_tokens, choice=choice)
        self._orders = count()

    def __call__(
        self,
        *,
        adapter: str | None = None,
        rank: int = 4,
        arrival_s: float | None = None,
        max_len: int = 100_000,
        **fields: object,
    ) -> Sequence:
        """Return a sequence that waits; by default they arrive a second apart."""
        order = next(self._orders)
        manifest = make_manifest(adapter, rank) if adapter else None
        request = make_request(
            f"r{order}",
            adapter=manifest,
            arrival_s=float(order) if arrival_s is None else arrival_s,
            **fields,
        )
        return self.of(request, order, max_len)

    def of(self, request: Request, order: int, max_len: int = 100_000) -> Sequence:
        """Return the sequence of a request."""
        layouts = tuple(AdapterLayout(self.accounts.layout, m.spec) for m, _ in request.adapters)
        adapter = request.adapter
        table = self.accounts.new_table(adapter.adapter_id if adapter else None)
        return Sequence(request, order, table, layouts, max_len, frozenset())


def answer(sequence: Sequence, num_generated: int) -> Sequence:
    """Give a sequence so many tokens of its answer, and no pages."""
    for _ in range(num_generated):
        sequence.num_tokens += 1
        sequence.append(7)
    return sequence


def run(sequence: Sequence, num_generated: int = 0) -> Sequence:
    """Give a sequence pages and the state after its prompt and so many tokens of its answer."""
    answer(sequence, num_generated)
    sequence.table.grow(sequence.num_tokens)
    sequence.num_computed = sequence.num_tokens - 1 if num_generated else 0
    return sequence
