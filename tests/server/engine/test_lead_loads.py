"""Rank 0's account of what the others have loaded and forgotten; with real ranks: `test_ranks`."""

from __future__ import annotations

from loraplex_server.engine.messages import DiscardAdapter
from loraplex_server.engine.ranks.lead_loads import LeadLoads
from loraplex_server.engine.ranks.messages import LoaderReport


class SilentRanks:
    """Implements what `LeadLoads` asks of `RankWorkers`; the test answers for the ranks."""

    timeout_s = 60.0
    failure = ""

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks
        self.sent = []
        self.on_report = None

    def send(self, message):
        self.sent.append(message)


def test_a_discard_ends_when_each_rank_has_answered_however_often_it_is_asked_for():
    ranks, wakes = SilentRanks(4), []
    loads = LeadLoads(ranks, lambda: wakes.append(None))
    for rank in (1, 2, 3):
        loads.discard("a")  # as the engine does at every step, woken by each answer
        assert loads.is_discarding("a")
        ranks.on_report(rank, LoaderReport((), ("a",), 0))
    assert not loads.is_discarding("a")
    assert len(wakes) == 3
    assert ranks.sent == [DiscardAdapter("a")] * 3
    loads.discard("a")  # it was loaded again meanwhile
    assert loads.is_discarding("a")
