"""What each tenant has waiting and spends, and who has had enough for now.

Whom neither a key nor `tenant_header` tells apart is one tenant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from loraplex_scheduler.plan import EndEvent, Event, TokenEvent
from loraplex_server.api.errors import (
    InvalidRequest,
    QuotaExceeded,
    QuotaTooSmall,
    RequestQuotaExceeded,
    TenantQueueFull,
)
from loraplex_server.api.job import Job
from loraplex_server.api.rate_limit import RateLimit
from loraplex_server.setting_values import TenantLimit, limit_of
from loraplex_server.tenants.ledger import UsageLedger
from loraplex_server.tenants.usage_store import Amounts

#: What stands between a tenant and its turn ends with others' answers, which nobody can foresee.
_QUEUE_RETRY_S: Final = 1.0


class TenantAccounts:
    """Used from the event loop; forgets a tenant that has nothing waiting.

    Args:
        max_queued: sequences of one tenant that may wait for their first token; 0 for no limit.
        tokens_per_minute: that one tenant may spend, prompts and answers; 0 for no limit.
        requests_per_minute: the same of requests, of which each model that answers is one.
        ledger: where usage is noted.
        clock: in seconds.
    """

    def __init__(
        self,
        *,
        max_queued: TenantLimit = 0,
        tokens_per_minute: TenantLimit = 0,
        requests_per_minute: TenantLimit = 0,
        ledger: UsageLedger | None = None,
        clock: Callable[[], float],
    ) -> None:
        self._max_queued = max_queued
        self._tokens = RateLimit("tokens", tokens_per_minute)
        self._requests = RateLimit("requests", requests_per_minute)
        self._ledger = ledger
        self._clock = clock
        self._queued: Counter[str] = Counter()

    def check_room(self, tenant: str, num_sequences: int) -> None:
        """Raise as `open` would for a job of so many sequences, its tokens aside."""
        limit = limit_of(self._max_queued, tenant)
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
            TenantQueueFull, RequestQuotaExceeded, QuotaExceeded: not now.
            InvalidRequest, QuotaTooSmall: never.
        """
        tenant = job.terms.tenant
        self.check_room(tenant, job.num_sequences)
        self._spend_request(tenant)
        try:
            self._spend(tenant, job.max_tokens)
        except (QuotaExceeded, QuotaTooSmall):
            self._requests.refund(tenant, 1)
            raise
        self._queued[tenant] += job.num_sequences
        bill = TenantBill(self, job)
        if self._ledger is not None:
            self._ledger.open(bill)
        return bill

    @property
    def has_limits(self) -> bool:
        """Whether any tenant may have a limit by the minute."""
        return self._requests.is_any or self._tokens.is_any

    def limit_headers(self, tenant: str) -> dict[str, str]:
        """Return what to tell a tenant of its limits; nothing of those that it has not."""
        now = self._clock()
        return self._requests.headers(tenant, now) | self._tokens.headers(tenant, now)

    def _spend_request(self, tenant: str) -> None:
        retry_after_s = self._requests.try_spend(tenant, 1, self._clock())
        if retry_after_s is not None:
            raise RequestQuotaExceeded(
                f"your {self._requests.per_minute(tenant)} requests a minute are spent; try again "
                f"in {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )

    def _spend(self, tenant: str, num_tokens: int) -> None:
        limit = self._tokens.per_minute(tenant)
        if limit and num_tokens > limit:
            raise QuotaTooSmall(
                f"the request may need {num_tokens} tokens, prompt and answer, and a tenant has "
                f"{limit} a minute; ask for a smaller max_tokens",
                param="max_tokens",
            )
        retry_after_s = self._tokens.try_spend(tenant, num_tokens, self._clock())
        if retry_after_s is not None:
            raise QuotaExceeded(
                f"the request may need {num_tokens} tokens, more than is left of the "
                f"{limit} that you have a minute; try again in {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )

    def leave_queue(self, tenant: str, num_sequences: int) -> None:
        """So many sequences wait no more; for bills."""
        self._queued[tenant] -= num_sequences
        if not self._queued[tenant]:
            del self._queued[tenant]

    def settle(self, bill: TenantBill, num_unused: int) -> None:
        """A bill is complete, and so many tokens were charged and not used; for bills."""
        self._tokens.refund(bill.tenant, num_unused)
        if self._ledger is not None:
            self._ledger.close(bill)


class TenantBill:
    """What one job has waiting and used so far; close it when its last event has come."""

    def __init__(self, accounts: TenantAccounts, job: Job) -> None:
        self._accounts = accounts
        self._job = job
        self._waiting = set(range(job.num_sequences))
        self._used_prompts: set[int] = set()
        self._num_generated = 0
        self._num_cached = 0

    @property
    def tenant(self) -> str:
        return self._job.terms.tenant

    @property
    def adapter(self) -> str:
        """Whose usage it is: "" is the base model; of a mixture all names, with commas."""
        return ",".join(adapter.lease.record.name for adapter in self._job.adapters)

    def used(self) -> Amounts:
        """Return what the job has cost so far: a prompt counts once, when a sample of it began."""
        num_prompt = sum(len(self._job.prompts[i]) for i in self._used_prompts)
        num_requests = 1 if self._used_prompts else 0
        return Amounts(num_requests, num_prompt, self._num_cached, self._num_generated)

    def book(self, index: int, event: Event) -> None:
        """Take an event of sequence `index`."""
        if isinstance(event, TokenEvent):
            self._num_generated += not self._job.has_no_answer
            if event.num_cached and index % self._job.n == 0:  # others find what this one computed
                self._num_cached += event.num_cached
        if index in self._waiting:  # its first event
            self._waiting.discard(index)
            self._accounts.leave_queue(self.tenant, 1)
            if not isinstance(event, EndEvent) or event.embedding is not None:
                self._used_prompts.add(index // self._job.n)

    def close(self) -> None:
        """Give back what was charged and not used; call it once."""
        if self._waiting:
            self._accounts.leave_queue(self.tenant, len(self._waiting))
            self._waiting.clear()
        used = self.used()
        unused = self._job.max_tokens - used.prompt_tokens - used.completion_tokens
        self._accounts.settle(self, max(0, unused))
