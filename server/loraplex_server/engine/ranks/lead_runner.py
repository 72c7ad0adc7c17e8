"""Rank 0's runner: every plan goes to all ranks before this one computes its part of it."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_scheduler.plan import Plan, StepResult
from loraplex_server.engine.errors import RankLost
from loraplex_server.engine.ranks.plan_news import PlanTeller
from loraplex_server.engine.ranks.workers import RankWorkers
from loraplex_server.engine.runner import Flight, StepRunner


@dataclass(frozen=True)
class _LeadFlight:
    """Implements `runner.Flight`: the flight of rank 0's own part, which waits for all others."""

    own: Flight
    workers: RankWorkers

    def result(self) -> StepResult:
        with self.workers.due():
            return self.own.result()


class LeadRunner:
    """Implements `runner.StepRunner`; owned by the engine step.

    Args:
        own: computes rank 0's part.
        workers: take up work.
    """

    def __init__(self, own: StepRunner, workers: RankWorkers) -> None:
        self._own = own
        self._workers = workers
        self._teller = PlanTeller()

    def launch(self, plan: Plan) -> Flight:
        """See `StepRunner`.

        Raises:
            RankLost: it cannot be computed, as another rank has ended or hangs, or does not know
                how far this one came with the step before.
        """
        if self._workers.failure:  # a GPU would take the step, and wait for the others for ever
            raise RankLost(self._workers.failure)
        with self._workers.due():
            self._workers.send(self._teller.tell(plan))
            return _LeadFlight(self._own.launch(plan), self._workers)

    def close(self) -> None:
        """See `StepRunner`; then the other ranks end."""
        try:
            if not self._workers.failure:  # without the others, what was launched may never end
                with self._workers.due("the last step was not computed"):
                    self._own.close()
        finally:
            self._workers.close()
