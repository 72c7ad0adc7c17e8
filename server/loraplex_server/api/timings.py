"""How long the parts of one answer took, for its body and its headers.

Queue, adapter load and prefill are those of the sequence that had its first token first, as the
engine measured them; everything else is as the answer's task saw the tokens come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loraplex_scheduler.plan import StartTimes

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class SequenceTimes:
    """One sequence's, in seconds on the engine's clock.

    Attributes:
        start: how it came to its first token; None where nobody measured it.
        first_s: when its first token, or its embedding, came; 0 before that.
        last_s: when its last token came.
        num_tokens: how many came.
    """

    start: StartTimes | None = None
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Of a whole answer, so far; immutable."""

    arrival_s: float
    sequences: tuple[SequenceTimes, ...]

    @classmethod
    def merge(cls, parts: Iterable[Timings]) -> Timings:
        """Return those of an answer that has several parts."""
        parts = list(parts)
        sequences = tuple(times for part in parts for times in part.sequences)
        return cls(min(part.arrival_s for part in parts), sequences)

    def metrics(self, now: float) -> dict[str, Any]:
        """Return the body's `metrics`, in milliseconds; null is what nobody knows."""
        begun = self._begun()
        if not begun:
            return {}
        first_s, last_s = begun[0].first_s, max(times.last_s for times in begun)
        start = begun[0].start
        num_gaps = sum(times.num_tokens - 1 for times in begun if times.num_tokens)
        decode_s = sum(times.last_s - times.first_s for times in begun)
        queue_s, load_s, prefill_s = (
            (start.queue_s, start.load_s, start.prefill_s) if start else (None, None, None)
        )
        computing_s = last_s - first_s + (prefill_s or 0.0)
        num_tokens = sum(times.num_tokens for times in begun)
        return {
            "time_to_first_token_ms": _ms(first_s - self.arrival_s),
            "queue_time_ms": _ms(queue_s),
            "adapter_load_ms": _ms(load_s),
            "prefill_ms": _ms(prefill_s),
            "decode_ms": _ms(last_s - first_s),
            "generation_time_ms": _ms(last_s - first_s),
            "mean_itl_ms": _ms(decode_s / num_gaps) if num_gaps else None,
            "tokens_per_second": _rate(num_tokens, computing_s),
            "total_time_ms": _ms(now - self.arrival_s),
        }

    def headers(self, now: float, *, is_complete: bool) -> Headers:
        """Return what is known of the same as headers of the answer.

        Args:
            is_complete: nothing comes any more; else only what led to the first token is told.
        """
        metrics = self.metrics(now)
        names = [
            ("x-queue-time-ms", "queue_time_ms"),
            ("x-adapter-load-ms", "adapter_load_ms"),
            ("x-prefill-ms", "prefill_ms"),
            ("x-time-to-first-token-ms", "time_to_first_token_ms"),
        ]
        if is_complete:
            names += [("x-decode-ms", "decode_ms"), ("x-total-time-ms", "total_time_ms")]
        shown = [(header, metrics.get(name)) for header, name in names]
        return [(header.encode(), b"%g" % ms) for header, ms in shown if ms is not None]

    def _begun(self) -> list[SequenceTimes]:
        """Return the sequences that had a first token, in the order they had it."""
        begun = [times for times in self.sequences if times.first_s]
        return sorted(begun, key=lambda times: times.first_s)


def _rate(num_tokens: int, seconds: float) -> float | None:
    return round(num_tokens / seconds, 3) if num_tokens and seconds > 0 else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds) * 1000, 3)
