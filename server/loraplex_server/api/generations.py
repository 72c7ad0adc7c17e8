"""Which requests are let in, and the accounts of those in flight.

Invariants: every accepted sequence is counted as finished exactly once, its tenant pays for what it
used, and an adapter's lease is held from before submission until the engine sent the terminal event
of the last sequence using it, whatever happened to the client meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from loraplex_scheduler.plan import Request
from loraplex_server.api.errors import (
    AdapterDeleted,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    QueueFull,
    RequestTimedOut,
)
from loraplex_server.api.generation import Generation
from loraplex_server.api.job import Job
from loraplex_server.api.job_meter import JobMeter
from loraplex_server.api.news import News
from loraplex_server.api.place_forecast import PlaceForecast
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.sampling import sequence_sampling
from loraplex_server.api.tenant_accounts import TenantAccounts, TenantBill
from loraplex_server.engine.adapted_prompt import adapt_prompt
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.text.assembler import TextAssembler
from loraplex_server.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Promises:
    """What a request is promised that asks for nothing of its own.

    Attributes:
        timeout_s: it ends so long after its arrival, whatever it asks for.
        ttft_slo_s: until its first token; None for no promise.
    """

    timeout_s: float
    ttft_slo_s: float | None = None


class Generations:
    """Admits jobs and remembers those in flight; used from the event loop."""

    def __init__(
        self,
        *,
        engine: EngineHandle,
        vocabulary: Vocabulary,
        metrics: RequestMetrics,
        max_sequences: int,
        promises: Promises,
        tenants: TenantAccounts,
        clock: Callable[[], float],
    ) -> None:
        """Admit up to `max_sequences` at once, of all tenants together."""
        self._engine = engine
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._max_sequences = max_sequences
        self._places = PlaceForecast(max_sequences, clock)
        self._promises = promises
        self._tenants = tenants
        self._clock = clock
        self._live: set[Generation] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._num_live = 0
        self._serials = itertools.count()

    @property
    def clock(self) -> Callable[[], float]:
        """The clock of all times here, in seconds."""
        return self._clock

    @property
    def num_live(self) -> int:
        """Sequences that the engine has not ended yet."""
        return self._num_live

    @property
    def num_jobs(self) -> int:
        """Requests that the engine has not ended yet, whatever they hold."""
        return len(self._live)

    def check_room(self, tenant: str, num_sequences: int) -> None:
        """Raise as `start` would for a job of so many sequences, its tokens aside."""
        if num_sequences > self._max_sequences:
            raise InvalidRequest(
                f"the request asks for {num_sequences} sequences; this server takes at most "
                f"{self._max_sequences} at once",
                param="n",
            )
        with self._counted_rejections():
            if self._num_live + num_sequences > self._max_sequences:
                raise QueueFull(
                    f"{self._num_live} sequences run or wait already; try again shortly",
                    retry_after_s=self._places.retry_after_s(num_sequences),
                )
            self._tenants.check_room(tenant, num_sequences)

    def start(self, jobs: Sequence[Job], news: News) -> list[Generation]:
        """Hand jobs of one tenant to the engine, all of them or none.

        From now on each generation owns its job's leases.

        Args:
            news: told of the events of all of them.

        Raises:
            Overloaded, EngineUnavailable: and the leases are still the caller's.
            InvalidRequest, QuotaTooSmall: it asks for more than could ever be admitted.
        """
        self.check_room(jobs[0].terms.tenant, sum(job.num_sequences for job in jobs))
        with self._counted_rejections():
            bills = self._open_bills(jobs)
        now = self._clock()
        pairs = zip(jobs, bills, strict=True)
        generations = [self._generation(job, bill, news, now) for job, bill in pairs]
        try:
            for generation in generations:
                generation.submit(self._engine)
                self._num_live += generation.num_sequences
                self._live.add(generation)
        except BaseException:
            for generation in generations:
                generation.withdraw()
            raise
        return generations

    def _open_bills(self, jobs: Sequence[Job]) -> list[TenantBill]:
        with contextlib.ExitStack() as opened:
            bills = []
            for job in jobs:
                bills.append(self._tenants.open(job))
                opened.callback(bills[-1].close)
            opened.pop_all()
        return bills

    def _generation(self, job: Job, bill: TenantBill, news: News, now: float) -> Generation:
        return Generation(
            job,
            self._requests(job, now),
            self._assemblers(job),
            timeout_error=self._timeout_error(job),
            news=news,
            bill=bill,
            metrics=self._metrics,
            meter=JobMeter(self._metrics, job, now),
            clock=self._clock,
            on_end=self._end,
        )

    def cancel_users(self, name: str, adapter_ids: Collection[str]) -> None:
        """End whatever runs on these adapters by this name, as it was deleted."""
        for generation in list(self._live):
            records = [adapter.lease.record for adapter in generation.job.adapters]
            if any(record.name == name and record.id in adapter_ids for record in records):
                generation.cancel(AdapterDeleted(name))

    @contextlib.contextmanager
    def _counted_rejections(self) -> Iterator[None]:
        try:
            yield
        except Overloaded as error:
            self._metrics.reject(type(error))
            raise

    def _end(self, generation: Generation) -> None:
        """The engine has ended all of it."""
        job = generation.job
        self._num_live -= job.num_sequences
        self._places.leave(job.num_sequences, generation.age_s)
        self._live.remove(generation)
        if job.adapters:
            release = asyncio.create_task(asyncio.to_thread(_release, job))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    def _requests(self, job: Job, now: float) -> tuple[Request, ...]:
        terms = job.terms
        ttft_slo_s = terms.ttft_slo_s or self._promises.ttft_slo_s
        (manifest, weight), *more = job.weighted_manifests or ((None, 1.0),)
        vocab_size = len(self._vocabulary)
        prompts = [adapt_prompt(manifest, prompt, vocab_size) for prompt in job.prompts]
        # Clients may choose a job's id, and the parts of one answer share it.
        stem = f"{job.job_id}-{next(self._serials)}"
        return tuple(
            Request(
                request_id=f"{stem}-{index}",
                prompt_token_ids=prompts[index // job.n].token_ids,
                sampling=sequence_sampling(job.sampling, index),
                adapter=prompts[index // job.n].adapter,
                arrival_s=now,
                deadline_s=now + min(self._promises.timeout_s, terms.deadline_s or math.inf),
                first_token_by_s=None if ttft_slo_s is None else now + ttft_slo_s,
                tenant=terms.tenant,
                priority=terms.priority,
                adapter_start=prompts[index // job.n].adapter_start,
                num_virtual=prompts[index // job.n].num_virtual,
                adapter_weight=weight,
                more_adapters=tuple(more),
                pooling=job.pooling,
                prefix_salt=terms.prefix_salt,
            )
            for index in range(job.num_sequences)
        )

    def _timeout_error(self, job: Job) -> RequestTimedOut:
        """Return what to say should the job's time be up: whose time it was."""
        deadline_s, timeout_s = job.terms.deadline_s, self._promises.timeout_s
        if deadline_s is not None and deadline_s <= timeout_s:
            return DeadlineExceeded(
                f"the answer was not complete within the request's deadline_s of {deadline_s:g} s",
                param="deadline_s",
            )
        return RequestTimedOut(
            f"the answer was not complete within the server's request_timeout_s of {timeout_s:g} s"
        )

    def _assemblers(self, job: Job) -> list[TextAssembler]:
        return [
            TextAssembler(
                self._vocabulary,
                job.text,
                prompt_ids=job.prompts[index // job.n],
                stop_token_ids=job.sampling.stop_token_ids,
            )
            for index in range(job.num_sequences)
        ]


def _release(job: Job) -> None:
    for adapter in job.adapters:
        adapter.lease.release()
