"""Errors of the engine package.

EngineError
├── EngineUnavailable    the engine process is starting, restarting or gone
└── EngineConfigError    the engine cannot start with these settings
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything this package raises on purpose."""


class EngineUnavailable(EngineError):
    """Nothing can be computed right now; try again after `retry_after_s` seconds."""

    def __init__(self, *, reason: str, retry_after_s: float) -> None:
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(reason)


class EngineConfigError(EngineError):
    """A setting that the engine cannot work with; the message says which and what to change."""
