"""Errors of the engine package.

EngineError
├── EngineUnavailable    the engine process is starting, restarting or gone
├── EngineConfigError    the engine cannot start with these settings
└── RankLost             one of the processes that compute a model together is gone
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


class RankLost(EngineError):
    """A rank has ended or hangs, so nothing can be computed by this engine any more.

    The engine's process ends of it and is started again; the message names rank and cause.
    """
