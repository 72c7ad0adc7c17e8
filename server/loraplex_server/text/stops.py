"""Stop strings, found wherever token boundaries fall.

The match that is complete first decides; of two complete at once, the longer. That rule depends on
the text alone, never on how it was cut into tokens. Text that may be the beginning of a stop string
is held back until it is known.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches the text of one sequence for its stop strings."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """Watch for `stops`, none of them empty."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._matched

    @property
    def has_matched(self) -> bool:
        return self._matched is not None

    def push(self, text: str) -> str:
        """Return the text that is safe to send now; nothing more once a stop string matched."""
        if self._matched is not None:
            return ""
        if not self._stops:
            return text
        window = self._held + text
        self._held = ""
        if (match := self._first_match(window)) is not None:
            start, self._matched = match
            return window[: start + len(self._matched)] if self._include else window[:start]
        safe_len = len(window) - self._held_len(window)
        self._held = window[safe_len:]
        return window[:safe_len]

    def flush(self) -> str:
        """Return the text held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str) -> tuple[int, str] | None:
        found = [(window.find(stop), stop) for stop in self._stops]
        complete = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not complete:
            return None
        _, start, stop = min(complete)
        return start, stop

    def _held_len(self, window: str) -> int:
        """Return the length of the longest end of `window` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = window.find(stop[0], max(0, len(window) - len(stop) + 1))
            while start >= 0:
                if stop.startswith(window[start:]):
                    longest = max(longest, len(window) - start)
                    break
                start = window.find(stop[0], start + 1)
        return longest
