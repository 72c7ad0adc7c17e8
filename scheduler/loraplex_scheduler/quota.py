"""Tokens per minute, by tenant."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

#: Tenants remembered; whoever has not asked for a minute needs no remembering.
_MAX_TENANTS: Final = 65536


class TokenQuota:
    """A token bucket per tenant: it holds a minute's tokens and fills evenly.

    Owned by one thread. A request for more than the bucket holds passes when the bucket is full and
    leaves a debt, or it could never pass. Times are seconds on any clock that never goes back.
    """

    def __init__(self, tokens_per_minute: int, *, max_tenants: int = _MAX_TENANTS) -> None:
        """
        Args:
            max_tenants: of more than so many the one that asked longest ago is forgotten, which
                fills its bucket.
        """
        if tokens_per_minute < 1:
            raise ValueError(f"a quota of {tokens_per_minute} tokens per minute serves nobody")
        self._capacity = float(tokens_per_minute)
        self._per_s = tokens_per_minute / 60.0
        self._max_tenants = max_tenants
        # By tenant, asked longest ago first: tokens in the bucket at a time.
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def try_spend(self, tenant: str, num_tokens: int, now: float) -> float | None:
        """Take tokens from the tenant's bucket.

        Returns:
            None, or, with nothing taken, the seconds after which they can be had if nobody else
            takes any.
        """
        level = self._level(tenant, now)
        missing = min(num_tokens, self._capacity) - level
        if missing > 0:
            return missing / self._per_s
        self._set(tenant, level - num_tokens, now)
        return None

    def left(self, tenant: str, now: float) -> float:
        """Return what is in the tenant's bucket; below 0 while it pays a debt."""
        return self._level(tenant, now)

    def refund(self, tenant: str, num_tokens: int) -> None:
        """Give back tokens that were taken and turned out not to be needed."""
        known = self._levels.get(tenant)
        if known is not None:
            level, then = known
            self._levels[tenant] = min(self._capacity, level + num_tokens), then

    def _level(self, tenant: str, now: float) -> float:
        level, then = self._levels.get(tenant, (self._capacity, now))
        return min(self._capacity, level + (now - then) * self._per_s)

    def _set(self, tenant: str, level: float, now: float) -> None:
        self._levels[tenant] = level, now
        self._levels.move_to_end(tenant)
        if len(self._levels) > self._max_tenants:
            self._levels.popitem(last=False)
