"""So much a minute for each tenant, and what its answers say of it, as OpenAI's do."""

from __future__ import annotations

from loraplex_scheduler.quota import TokenQuota
from loraplex_server.setting_values import TenantLimit, limit_of


class RateLimit:
    """Used from the event loop.

    Args:
        what: is limited, as headers call it: `requests` or `tokens`.
        limits: by the minute; 0 is none.
    """

    def __init__(self, what: str, limits: TenantLimit) -> None:
        self._what = what
        self._limits = limits
        # One for each limit that there is: tenants with the same one share a table.
        self._quotas: dict[int, TokenQuota] = {}

    @property
    def is_any(self) -> bool:
        """Whether there is a limit for anybody."""
        return bool(self._limits if isinstance(self._limits, int) else any(self._limits.values()))

    def per_minute(self, tenant: str) -> int:
        """Return what a tenant gets a minute; 0 for no limit."""
        return limit_of(self._limits, tenant)

    def try_spend(self, tenant: str, amount: int, now: float) -> float | None:
        """Take so much, or return the seconds after which it can be had; see `TokenQuota`."""
        quota = self._quota_of(tenant)
        return None if quota is None else quota.try_spend(tenant, amount, now)

    def refund(self, tenant: str, amount: int) -> None:
        """Give back what was taken and turned out not to be needed."""
        quota = self._quota_of(tenant)
        if quota is not None and amount:
            quota.refund(tenant, amount)

    def headers(self, tenant: str, now: float) -> dict[str, str]:
        """Return the limit, what is left of it, and when all of it will be there again."""
        quota = self._quota_of(tenant)
        if quota is None:
            return {}
        left = quota.left(tenant, now)
        limit = self.per_minute(tenant)
        return {
            f"x-ratelimit-limit-{self._what}": str(limit),
            f"x-ratelimit-remaining-{self._what}": str(max(0, int(left))),
            f"x-ratelimit-reset-{self._what}": _duration((limit - left) * 60 / limit),
        }

    def _quota_of(self, tenant: str) -> TokenQuota | None:
        limit = self.per_minute(tenant)
        if not limit:
            return None
        if limit not in self._quotas:
            self._quotas[limit] = TokenQuota(limit)
        return self._quotas[limit]


def _duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: `1m30.5s`, `0s`."""
    minutes, rest = divmod(round(max(0.0, seconds), 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
