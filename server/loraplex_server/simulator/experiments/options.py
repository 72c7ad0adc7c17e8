"""What every experiment can be told, and what an experiment is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_server.simulator.report import Report


@dataclass(frozen=True)
class Options:
    """Common to all experiments.

    Attributes:
        seed: of every workload.
        is_quick: shorter runs and fewer points, for a first look; the targets are for full runs.
        has_progress: tell standard error what is being simulated.
    """

    seed: int = 42
    is_quick: bool = False
    has_progress: bool = True

    def tell(self, what: str) -> None:
        """Say what is being simulated now."""
        if self.has_progress:
            sys.stderr.write(f"  {what}\n")
            sys.stderr.flush()


@dataclass(frozen=True)
class Experiment:
    """One experiment by name.

    Attributes:
        about: one line for the list.
        minutes: about how long a full run takes on two cores of a laptop.
    """

    name: str
    about: str
    minutes: float
    run: Callable[[Options], Report]
