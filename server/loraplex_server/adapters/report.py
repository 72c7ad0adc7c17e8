"""What became of everything in an adapter folder: the account that an upload's owner is given."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

#: applied: used as it is; folded: converted exactly; no effect: cannot change an output; refused.
Verdict = Literal["applied", "folded", "no effect", "refused"]
Kind = Literal["adapter", "field", "tensor"]


@dataclass(frozen=True)
class ReportEntry:
    """One configuration field, one tensor, or something of the adapter as a whole.

    Attributes:
        subject: the name of the field or tensor; a module, or what else a reason is about.
        verdict: what became of it.
        detail: how it was folded, or why it has no effect or is refused; may be empty.
        kind: what `subject` names.
    """

    subject: str
    verdict: Verdict
    detail: str = ""
    kind: Kind = "adapter"


@dataclass(frozen=True)
class ReadingReport:
    """Immutable; holds every configuration field and every tensor of the folder exactly once."""

    entries: tuple[ReportEntry, ...] = ()

    def count(self, verdict: Verdict) -> int:
        """Return how many entries have the verdict."""
        return Counter(entry.verdict for entry in self.entries)[verdict]

    def to_json(self) -> list[dict[str, str]]:
        """Return the entries as JSON has them."""
        return [asdict(entry) for entry in self.entries]
