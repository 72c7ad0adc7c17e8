"""What each tenant has waiting and spends, and who has had enough for now.

Until keys exist per tenant, everybody whom `tenant_header` does not tell apart is one tenant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from loraplex_scheduler.plan import EndEvent, Event, TokenEvent
from loraplex_scheduler.quota import TokenQuota
from loraplex_server.api.errors import (
    InvalidRequest,
    QuotaExceeded,
    QuotaTooSmall,
    TenantQueueFull,
)
from loraplex_server.api.job import Job

#: What stands between a tenant and its turn ends with others' answers, which nobody can foresee.
_QUEUE_RETRY_S: Final = 1.0


class TenantAccounts:
    """Used from the event loop; forgets a tenant that has nothing waiting.

    Args:
        max_queued: sequences of one tenant that may wait for their first token; 0 for no limit.
        tokens_per_minute: that one tenant may spend, prompts and answers; 0 for no limit.
        clock: in seconds.
    """

    def __init__(
        self,
        *,
        max_queued: int = 0,
        tokens_per_minute: int = 0,
        clock: Callable[[], float],
    ) -> None:
        self._max_queued = max_queued
        self._tokens_per_minute = tokens_per_minute
        self._quota = TokenQuota(tokens_per_minute) if tokens_per_minute else None
        self._clock = clock
        self._queued: Counter[str] = Counter()

    def check_room(self, tenant: str, num_sequences: int) -> None:
        """Raise as `open` would for a job of so many sequences, its tokens aside."""
        limit = self._max_queued
        if not limit:
            return
        if num_sequences > limit:
            raise InvalidRequest(
                f"the request asks for {num_sequences} sequences; one tenant may have {limit} "
                "waiting",
                param="n",
            )
        if self._queued[tenant] + num_sequences > limit:
            raise TenantQueueFull(
                f"{self._queued[tenant]} of your sequences wait already, and a tenant may have "
                f"{limit} waiting; try again shortly",
                retry_after_s=_QUEUE_RETRY_S,
            )

    def open(self, job: Job) -> TenantBill:
        """Book a job that arrives: it waits, and may cost as much as it asks for.

        Raises:
            TenantQueueFull, QuotaExceeded: not now.
            InvalidRequest, QuotaTooSmall: never.
        """
        tenant = job.terms.tenant
        self.check_room(tenant, job.num_sequences)
        self._spend(tenant, job.max_tokens)
        self._queued[tenant] += job.num_sequences
        return TenantBill(self, job)

    def _spend(self, tenant: str, num_tokens: int) -> None:
        if self._quota is None:
            return
        if num_tokens > self._tokens_per_minute:
            raise QuotaTooSmall(
                f"the request may need {num_tokens} tokens, prompt and answer, and a tenant has "
                f"{self._tokens_per_minute} a minute; ask for a smaller max_tokens",
                param="max_tokens",
            )
        retry_after_s = self._quota.try_spend(tenant, num_tokens, self._clock())
        if retry_after_s is not None:
            raise QuotaExceeded(
                f"the request may need {num_tokens} tokens, more than is left of the "
                f"{self._tokens_per_minute} that you have a minute; try again in "
                f"{retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )

    def leave_queue(self, tenant: str, num_sequences: int) -> None:
        """So many sequences wait no more; for bills."""
        self._queued[tenant] -= num_sequences
        if not self._queued[tenant]:
            del self._queued[tenant]

    def give_back(self, tenant: str, num_tokens: int) -> None:
        """So many tokens were charged and not used; for bills."""
        if self._quota is not None and num_tokens:
            self._quota.refund(tenant, num_tokens)


class TenantBill:
    """What one job has waiting and used so far; close it when its last event has come."""

    def __init__(self, accounts: TenantAccounts, job: Job) -> None:
        self._accounts = accounts
        self._job = job
        self._waiting = set(range(job.num_sequences))
        self._used_prompts: set[int] = set()
        self._num_generated = 0

    def book(self, index: int, event: Event) -> None:
        """Take an event of sequence `index`."""
        is_token = isinstance(event, TokenEvent)
        self._num_generated += is_token
        if index in self._waiting:  # its first event
            self._waiting.discard(index)
            self._accounts.leave_queue(self._job.terms.tenant, 1)
            if not isinstance(event, EndEvent) or event.embedding is not None:
                self._used_prompts.add(index // self._job.n)

    def close(self) -> None:
        """Give back what was charged and not used; call it once."""
        tenant = self._job.terms.tenant
        if self._waiting:
            self._accounts.leave_queue(tenant, len(self._waiting))
            self._waiting.clear()
        self._accounts.give_back(tenant, self._unused())

    def _unused(self) -> int:
        used = sum(len(self._job.prompts[i]) for i in self._used_prompts) + self._num_generated
        return max(0, self._job.max_tokens - used)
