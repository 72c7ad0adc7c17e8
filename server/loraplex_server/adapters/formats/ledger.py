"""The account of one reading: a verdict on every field and tensor, and every reason to refuse."""

from __future__ import annotations

from typing import Final

from loraplex_server.adapters.errors import AdapterRefused
from loraplex_server.adapters.report import Kind, ReadingReport, ReportEntry, Verdict

_MAX_SUBJECTS: Final = 3
_MAX_REASONS: Final = 50
_MAX_NAME: Final = 200
#: A later verdict of a higher rank replaces an earlier one.
_RANK: Final[dict[Verdict, int]] = {"applied": 0, "no effect": 1, "folded": 2, "refused": 3}


class Ledger:
    """Owned by the reading of one adapter; true once there is a reason to refuse it.

    Faults of one kind are told once, with the first few subjects and the number of the rest: an
    adapter with 400 magnitude vectors gets one line, not 400.
    """

    def __init__(self) -> None:
        self._subjects: dict[str, list[str]] = {}
        self._entries: dict[tuple[Kind, str], ReportEntry] = {}

    def __bool__(self) -> bool:
        return bool(self._subjects)

    def field(self, name: str, verdict: Verdict, detail: str = "") -> None:
        """Note what becomes of a configuration field."""
        self._note("field", name, verdict, detail)

    def tensor(self, name: str, verdict: Verdict, detail: str = "") -> None:
        """Note what becomes of a tensor."""
        self._note("tensor", name, verdict, detail)

    def refuse(self, reason: str, subject: str | None = None, *, kind: Kind = "adapter") -> None:
        """Record a fault, of the tensor, field or module `subject` if it is about one of many."""
        subjects = self._subjects.setdefault(reason, [])
        if subject is not None:
            subjects.append(subject[:_MAX_NAME])
        self._note(kind, subject or "", "refused", reason)

    def refuse_field(self, name: str, reason: str) -> None:
        """Record a fault of a configuration field, which `reason` names."""
        self._subjects.setdefault(reason, [])
        self._note("field", name, "refused", reason)

    @property
    def is_folded(self) -> bool:
        """Whether something was converted, rather than used as it came."""
        return any(entry.verdict == "folded" for entry in self._entries.values())

    def has_verdict(self, kind: Kind, name: str) -> bool:
        """Whether the field or tensor has been accounted for."""
        return (kind, name[:_MAX_NAME]) in self._entries

    def reasons(self) -> tuple[str, ...]:
        """Every kind of fault, in the order they were found."""
        told = [self._tell(reason, subjects) for reason, subjects in self._subjects.items()]
        if len(told) > _MAX_REASONS:
            told[_MAX_REASONS:] = [f"and {len(told) - _MAX_REASONS} more reasons"]
        return tuple(told)

    def report(self) -> ReadingReport:
        """Return the account so far: the adapter as a whole, then fields, then tensors."""
        kinds: tuple[Kind, ...] = ("adapter", "field", "tensor")
        entries = sorted(self._entries.values(), key=lambda entry: kinds.index(entry.kind))
        return ReadingReport(tuple(entries))

    def raise_if_any(self) -> None:
        """Raises AdapterRefused with all reasons, if there are any."""
        if self:
            raise AdapterRefused(self.reasons(), report=self.report())

    def _note(self, kind: Kind, name: str, verdict: Verdict, detail: str) -> None:
        key = (kind, name[:_MAX_NAME])
        known = self._entries.get(key)
        if known is not None and known.verdict == "refused" == verdict:
            detail = f"{known.detail}; {detail}" if known.detail != detail else detail
        elif known is not None and _RANK[known.verdict] > _RANK[verdict]:
            return
        self._entries[key] = ReportEntry(key[1], verdict, detail, kind)

    @staticmethod
    def _tell(reason: str, subjects: list[str]) -> str:
        if not subjects:
            return reason
        named = ", ".join(subjects[:_MAX_SUBJECTS])
        rest = len(subjects) - _MAX_SUBJECTS
        return f"{named} and {rest} more: {reason}" if rest > 0 else f"{named}: {reason}"
