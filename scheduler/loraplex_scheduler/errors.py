"""Errors of the scheduler package.

SchedulerError
├── InvalidSampling     a sampling parameter is out of range
└── RequestRefused      the request can never run here (too long for the model or the pool)
"""

from __future__ import annotations


class SchedulerError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidSampling(SchedulerError):
    """A sampling parameter is out of range."""

    def __init__(self, *, param: str, reason: str) -> None:
        self.param = param
        self.reason = reason
        super().__init__(reason)


class RequestRefused(SchedulerError):
    """No amount of waiting would let this request run."""

    def __init__(self, *, reason: str, param: str | None = None) -> None:
        self.param = param
        self.reason = reason
        super().__init__(reason)
