"""The list of reasons why an adapter is refused, complete but readable."""

from __future__ import annotations

from typing import Final

from loraplex_server.adapters.errors import AdapterRefused

_MAX_SUBJECTS: Final = 3
_MAX_REASONS: Final = 50


class Ledger:
    """Collects faults while one adapter is read; owned by that reading.

    Faults of one kind are told once, with the first few subjects and the number of the rest: an
    adapter with 400 magnitude vectors gets one line, not 400.
    """

    def __init__(self) -> None:
        self._subjects: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._subjects)

    def add(self, reason: str, subject: str | None = None) -> None:
        """Record a fault, of the tensor or field `subject` if it is about one of many."""
        subjects = self._subjects.setdefault(reason, [])
        if subject is not None:
            subjects.append(subject[:200])

    def reasons(self) -> tuple[str, ...]:
        """Every kind of fault, in the order they were found."""
        told = [self._tell(reason, subjects) for reason, subjects in self._subjects.items()]
        if len(told) > _MAX_REASONS:
            told[_MAX_REASONS:] = [f"and {len(told) - _MAX_REASONS} more reasons"]
        return tuple(told)

    def raise_if_any(self) -> None:
        """Raises AdapterRefused with all reasons, if there are any."""
        if self:
            raise AdapterRefused(self.reasons())

    @staticmethod
    def _tell(reason: str, subjects: list[str]) -> str:
        if not subjects:
            return reason
        named = ", ".join(subjects[:_MAX_SUBJECTS])
        rest = len(subjects) - _MAX_SUBJECTS
        return f"{named} and {rest} more: {reason}" if rest > 0 else f"{named}: {reason}"
