"""Errors of the simulator.

SimulationError     an experiment, a device or a file that cannot be used as asked
"""

from __future__ import annotations


class SimulationError(Exception):
    """What was asked for cannot be simulated; the message says what to do instead."""
