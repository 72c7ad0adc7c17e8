"""What is measured of one job: its sequences' times, booked to the metrics as they come."""

from __future__ import annotations

from typing import Final

from loraplex_scheduler.plan import FinishReason, StartTimes
from loraplex_server.api.job import Job
from loraplex_server.api.job_record import ERRORS, JobRecord, SequenceRecord
from loraplex_server.api.request_metrics import RequestMetrics

#: A tenant's name where nobody tells tenants apart: no tenant can be called so.
NO_TENANT: Final = "(none)"


class JobMeter:
    """Owned by a generation; used from the event loop.

    Attributes:
        next_tokens: takes the seconds between two deliveries; called for each.
    """

    def __init__(self, metrics: RequestMetrics, job: Job, arrival_s: float) -> None:
        self._metrics = metrics
        self._job = job
        self.next_tokens = metrics.inter_token.observe
        names = [adapter.lease.record.name for adapter in job.adapters]
        self.record = JobRecord(
            model="+".join(names) or metrics.base_name,
            adapter_ids=tuple(adapter.lease.record.id for adapter in job.adapters),
            tenant=job.terms.tenant,
            num_prompt_tokens=job.num_prompt_tokens,
            arrival_s=arrival_s,
            sequences=[
                SequenceRecord(num_prompt=len(job.prompts[i // job.n]))
                for i in range(job.num_sequences)
            ],
        )
        if job.terms.exchange is not None:
            job.terms.exchange.jobs.append(self.record)

    def first_token(self, index: int, now: float, times: StartTimes | None) -> None:
        """A sequence got its first token; `times` as the engine told them."""
        since_arrival_s = now - self.record.arrival_s
        self.record.sequences[index].first_token_s = now
        self._metrics.first_token.observe(since_arrival_s)
        self._book(ttft_seconds=since_arrival_s, first_tokens=1)
        self.begun(index, times)

    def begun(self, index: int, times: StartTimes | None) -> None:
        """A sequence's prompt was computed: it has a token, or an embedding."""
        metrics = self._metrics
        num_prompt = self.record.sequences[index].num_prompt
        metrics.prompt_len.observe(num_prompt)
        if index % self._job.n == 0:  # the other samples find it in the cache
            metrics.num_prompt_tokens += num_prompt
            self._book(traffic=num_prompt, prompt_tokens=num_prompt)
        if times is None:
            return
        self.record.sequences[index].times = times
        metrics.queue.observe(times.queue_s)
        metrics.prefill.observe(times.prefill_s)
        if self.record.adapter_ids:
            metrics.adapter_wait.observe(times.load_s)

    def finish(self, index: int, outcome: FinishReason, now: float, num_generated: int) -> None:
        """A sequence ended; called exactly once for each."""
        sequence = self.record.sequences[index]
        sequence.end_s, sequence.outcome, sequence.num_generated = now, outcome, num_generated
        metrics = self._metrics
        metrics.finish(outcome, now - self.record.arrival_s)
        self._book(
            traffic=1 + num_generated,
            requests=1,
            generated_tokens=num_generated,
            errors=outcome in ERRORS,
        )
        if sequence.first_token_s is None:
            return
        decode_s = now - sequence.first_token_s
        metrics.answer_len.observe(num_generated)
        metrics.decode.observe(decode_s)
        if sequence.times is not None:
            metrics.inference.observe(sequence.times.prefill_s + decode_s)
        if num_generated > 1:
            metrics.per_token.observe(decode_s / (num_generated - 1))

    def _book(self, traffic: float = 0.0, **amounts: float) -> None:
        self._metrics.adapters.add(self.record.model, traffic, **amounts)
        self._metrics.tenants.add(self.record.tenant or NO_TENANT, traffic, **amounts)
