"""When a failed attempt is made again, and after how long. Pure: no clock, no randomness.

A request is sent again when the server said "not now" (408, 429, 5xx) or when the connection
broke. Two kinds of request are held back once they may have been acted on (`is_repeatable=False`):
uploads, which are costly to send again, and deletions, whose second answer would be a misleading
404. They are sent again only when nothing was sent, or on 429 and 503, which say that nothing was
done. 409 is never retried: the name will still be taken. Nor is a read timeout or a 504: the server
may well have been at work, and a second copy of the request would only add to its load. A server
that sends `x-should-retry` knows better than all of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_RETRY_AFTER_S = 60.0  # a caller asked to wait longer than this decides for itself


@dataclass(frozen=True)
class Failure:
    """What one attempt came to.

    Attributes:
        status_code: The error status, or None when no response came.
        was_sent: False when the connection could not even be opened.
        is_timeout: The response did not come in time.
        retry_after_s: Seconds the server asked to wait.
        should_retry: What the server said of it, in `x-should-retry`.
    """

    status_code: int | None = None
    was_sent: bool = True
    is_timeout: bool = False
    retry_after_s: float | None = None
    should_retry: bool | None = None


def retry_delay_s(
    failure: Failure, *, attempt: int, max_retries: int, is_repeatable: bool, jitter: float
) -> float | None:
    """Return the seconds to wait before the next attempt, or None to give up.

    Args:
        failure: What the last attempt came to.
        attempt: How many attempts failed before it.
        max_retries: How many attempts may follow the first.
        is_repeatable: Doing the request twice is the same as doing it once, and cheap.
        jitter: In [0, 1): how much of the last quarter of the delay to take off, so that clients
            that failed together do not come back together.
    """
    if attempt >= max_retries or not _may_retry(failure, is_repeatable):
        return None
    if failure.retry_after_s is not None:
        return failure.retry_after_s if failure.retry_after_s <= MAX_RETRY_AFTER_S else None
    return float(min(FIRST_DELAY_S * 2**attempt, MAX_DELAY_S) * (1 - 0.25 * jitter))


def _may_retry(failure: Failure, is_repeatable: bool) -> bool:
    status = failure.status_code
    if failure.should_retry is not None:
        return failure.should_retry
    if status is None:
        return not failure.was_sent or (is_repeatable and not failure.is_timeout)
    if not is_repeatable:
        return status in (429, 503)
    return status in (408, 429) or (status >= 500 and status != 504)


def parse_should_retry(headers: Mapping[str, str]) -> bool | None:
    """Read `x-should-retry`, which only `true` and `false` mean anything in."""
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())


def parse_retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Read `retry-after-ms` or `Retry-After` (seconds or an HTTP date), as seconds >= 0."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    try:
        date = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
