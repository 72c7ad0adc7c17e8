"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended; only a failure makes `doctor` exit with 1."""

    OK = "ok"
    NOTE = "note"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One finding; `advice` says what to do, and is empty only where all is well."""

    verdict: Verdict
    subject: str
    told: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.advice or self.verdict is Verdict.OK


def ok(subject: str, told: str) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, subject, told)


def note(subject: str, told: str, advice: str) -> Finding:
    """It works, with less than there could be."""
    return Finding(Verdict.NOTE, subject, told, advice)


def fail(subject: str, told: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(Verdict.FAIL, subject, told, advice)
