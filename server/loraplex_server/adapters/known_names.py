"""What names stood for when the registry was asked last, and whether that still counts.

What is known counts while no change can have been missed: for `STALE_S` after the beginning of the
last complete reading of the changes that other servers made. Where the registry does not answer, it
counts for `outage_s`. A registry that is this server's alone has no changes but its own.

What there is and what there is not are kept apart, so that whoever asks for many names that do not
exist pushes out none that do. Both matter in an outage: for `tenant/name`, which is not there, a
tenant reads the shared `name`.

Memory: a row takes 1 or 2 KiB, more only where its name has a chat template of its own.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.version_row import VersionRow

#: With the time between two readings, below the two seconds in which all servers see a change.
STALE_S: Final = 1.5
#: A reading of changes that takes longer is of a registry that does not answer. With the time
#: between two readings, below `STALE_S`: nobody is to ask for what is known, and hang with it.
SILENT_S: Final = 0.75
#: Asked again after so long even so: a server of an earlier release writes no changes down.
_REREAD_S: Final = 10.0
#: Of each kind: of names that there are, and of those that there are not.
_MAX_NAMES: Final = 16_384
#: Versions of one name, beside the name itself.
_MAX_VERSIONS: Final = 8


@dataclass(frozen=True)
class Known:
    """The answer to one question: a version, or that there is none.

    Attributes:
        asked_s: when the registry was, by the clock.
    """

    row: VersionRow | None
    asked_s: float


class _Answers:
    """Answers of one kind, by name and version; those that nobody used for longest go first."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, dict[str | None, Known]] = OrderedDict()

    def find(self, reference: AdapterReference) -> Known | None:
        known = self._names.get(reference.name, {}).get(reference.id_prefix)
        if known is not None:
            self._names.move_to_end(reference.name)
        return known

    def add(self, reference: AdapterReference, known: Known) -> None:
        answers = self._names.setdefault(reference.name, {})
        answers[reference.id_prefix] = known
        versions = [prefix for prefix in answers if prefix is not None]
        if len(versions) > _MAX_VERSIONS:
            del answers[versions[0]]
        self._names.move_to_end(reference.name)
        if len(self._names) > _MAX_NAMES:
            self._names.popitem(last=False)

    def drop(self, reference: AdapterReference) -> None:
        self._names.get(reference.name, {}).pop(reference.id_prefix, None)

    def forget(self, name: str) -> None:
        self._names.pop(name, None)

    def clear(self) -> None:
        self._names.clear()


class KnownNames:
    """Used under the lock of its owner, which tells it of every change.

    Args:
        is_shared: others change the registry too.
        outage_s: how long what is known counts while the registry does not answer.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        is_shared: bool,
        outage_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_shared = is_shared
        self._outage_s = outage_s
        self._clock = clock
        self._found = _Answers()
        self._absent = _Answers()
        self._questions: dict[object, AdapterReference] = {}
        self._read_s = -math.inf if is_shared else math.inf
        self._is_cut_off = False
        self._reading_since_s = math.inf

    # ---- what counts -------------------------------------------------------------------------

    def get(self, reference: AdapterReference) -> Known | None:
        """Return what is known and counts."""
        known = self._find(reference)
        if known is None or not self._is_shared:
            return known
        now = self._clock()
        if now - self._read_s <= STALE_S:
            age_s = now - known.asked_s
            # One asks again; all others are not to wait with it, for tables that may be locked.
            is_asked = age_s > _REREAD_S and reference in self._questions.values()
            patience_s = _REREAD_S + (self._outage_s if is_asked else 0.0)
            return known if age_s <= patience_s else None
        is_away = self._is_cut_off or now - self._reading_since_s > SILENT_S
        return known if is_away and self._survives(now) else None

    def get_in_need(self, reference: AdapterReference) -> Known | None:
        """Return what counts where the registry has just failed to answer."""
        return self._find(reference) if self._survives(self._clock()) else None

    def begin_reading(self, now_s: float) -> None:
        """Changes are being read from now on, by the clock; one of the next two tells the end."""
        self._reading_since_s = now_s

    def note_reading(self, began_s: float) -> None:
        """All changes up to this time, by the clock, are known."""
        self._read_s, self._is_cut_off, self._reading_since_s = began_s, False, math.inf

    def note_failure(self) -> None:
        """Changes could not be read."""
        self._is_cut_off, self._reading_since_s = True, math.inf

    # ---- questions ---------------------------------------------------------------------------

    def ask(self, reference: AdapterReference) -> object:
        """The registry is going to be asked; returns a ticket for `learn`."""
        ticket = object()
        self._questions[ticket] = reference
        return ticket

    def learn(self, ticket: object, row: VersionRow | None) -> bool:
        """Take the answer, and return whether it counts: the name may have changed meanwhile."""
        reference = self._questions.pop(ticket, None)
        if reference is None:
            return False
        here, elsewhere = self._found, self._absent
        if row is None:
            here, elsewhere = elsewhere, here
        elsewhere.drop(reference)
        here.add(reference, Known(row, self._clock()))
        return True

    def give_up(self, ticket: object) -> None:
        """There will be no answer. Idempotent, and fine after `learn`."""
        self._questions.pop(ticket, None)

    def forget(self, name: str) -> None:
        """The name was changed, or may have been."""
        self._found.forget(name)
        self._absent.forget(name)
        for ticket, reference in list(self._questions.items()):
            if reference.name == name:
                del self._questions[ticket]

    def forget_all(self) -> None:
        """Any name may have been changed."""
        self._found.clear()
        self._absent.clear()
        self._questions.clear()

    # ---- pieces ------------------------------------------------------------------------------

    def _find(self, reference: AdapterReference) -> Known | None:
        return self._found.find(reference) or self._absent.find(reference)

    def _survives(self, now: float) -> bool:
        return now - self._read_s <= self._outage_s
