"""Computing plans on a device that works while the host goes on.

Everything is enqueued on the current stream, and nothing waits but `DeviceFlight.result`. A step
of decodes alone replays a graph (`step_graphs`), unless it has a mixture of adapters or one that
edits more than linears; any other step runs the same kernels one by one.
Sampled tokens stay on the device, where the next step finds those it awaits. Of several ranks the
first samples, and sends them to the others' devices on the stream, outside of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.ops import DeviceBackend, StepOps
from loraplex_kernels.static_tables import StaticTables
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, SequenceStep, StepResult
from loraplex_server.engine.forward_batch import BatchBuilder
from loraplex_server.engine.prompt_reports import PromptReports, WantedRows
from loraplex_server.engine.runner import NOT_FINITE, Flight, Landed
from loraplex_server.engine.step_graphs import GraphRecorder, StepGraphs
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.device_copy import copy_to
from loraplex_server.model.device_sampler import DeviceSampler, SampledTokens
from loraplex_server.model.token_masks import GrammarMasks
from loraplex_server.model.transformer import Transformer

#: Source of an input token whose id the host knows.
_KNOWN: Final = -1


@dataclass(frozen=True)
class DeviceFlight:
    """Implements `runner.Flight`: host copies of what a step samples, and when they are there."""

    sampled: SampledTokens
    reports: PromptReports
    arrival: torch.cuda.Event | None

    def result(self) -> StepResult:
        if self.arrival is not None:
            self.arrival.synchronize()
        result = self.sampled.result(NOT_FINITE)
        self.reports.add_to(result, NOT_FINITE)
        return result


class DeviceRunner:
    """Implements `runner.StepRunner`; owned by the engine step.

    Args:
        backend: made for the same largest step.
        max_step_tokens: most token rows of a plan.
        max_running: most sequences of a plan.
        recorder: how decode steps are recorded; `record` must be called before the first plan.
        grammars: knows those of its requests.
    """

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        backend: DeviceBackend,
        *,
        max_step_tokens: int,
        max_running: int,
        recorder: GraphRecorder,
        grammars: GrammarMasks | None = None,
    ) -> None:
        self._model = model
        self._group = model.group
        # All ranks have the logits, but requests' grammars are known to the first alone.
        self._is_sampling = model.group is None or model.group.rank == 0
        self._grammars = grammars
        self._pool = pool
        self._backend = backend
        self._batches = BatchBuilder(pool.layout)
        self._sampler = DeviceSampler(max_running, pool.device)
        self._inputs = StaticTables(
            {
                "token_ids": (max_step_tokens,),
                "sources": (max_step_tokens,),
                "logit_rows": (max_running,),
            },
            pool.device,
        )
        self._logits = torch.zeros(
            (max_running, model.spec.vocab_size), dtype=torch.float32, device=pool.device
        )
        self._graphs = StepGraphs(self._decode, max_running, recorder)
        self._row_of: dict[str, int] = {}

    @torch.inference_mode()
    def record(self) -> None:
        """Record the decode steps; writes rubbish into the pool's first page, so do it first."""
        self._graphs.record_all()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Flight:
        """Enqueue a plan; returns before the device has computed it.

        A rank that does not sample has nothing to tell.
        """
        attention, lora = self._batches.attention(plan), self._batches.lora(plan)
        more_lora = self._batches.more_lora(plan)
        wanted = WantedRows.of(plan.sequences, attention.query_indptr.tolist()[1:])
        edited = self._batches.edits(plan, wanted.rows)
        sampled, reports = None, PromptReports()
        if not edited and not more_lora and not wanted.has_reports:
            sampled = self._try_replay(plan.sequences, attention, lora)
        if sampled is None:
            edits = AdapterEdits(edited, attention, self._pool) if edited else None
            ops = self._backend.prepare(attention, lora, more_lora)
            sampled, reports = self._run(plan.sequences, ops, wanted, edits)
        self._row_of = {row.request_id: i for i, row in enumerate(sampled.rows)}
        if self._group is not None and sampled.rows:
            self._group.broadcast(sampled.tokens)
        if not self._is_sampling:
            return Landed(StepResult({}))
        on_host, reports = sampled.to_host(), reports.to_host()
        arrival = None
        if self._pool.device.type == "cuda":
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record()
        return DeviceFlight(on_host, reports, arrival)

    def close(self) -> None:
        """See `StepRunner`; NCCL gives a group up only when no graph holds a collective of it."""
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
        self._graphs.forget()

    def _try_replay(
        self, steps: Sequence[SequenceStep], attention: AttentionBatch, lora: LoRABatch | None
    ) -> SampledTokens | None:
        """Replay the graph of a step of decodes; None when there is none for this step."""
        if not all(step.num_tokens == 1 and step.is_sampled for step in steps):
            return None
        num_rows = self._graphs.padded(len(steps))
        if not self._backend.fill(attention, lora, num_rows):
            return None
        self._fill_inputs(steps)
        if self._is_sampling:
            self._sampler.fill(steps)
        self._graphs.replay(num_rows, lora is not None)
        if self._sampler.is_plain(steps):
            return self._sampler.collect(steps)
        return self._sample(self._logits[: len(steps)], steps)

    def _sample(self, logits: torch.Tensor, steps: Sequence[SequenceStep]) -> SampledTokens:
        """Choose a token for each row of logits, or make room for those that rank 0 chooses."""
        if not self._is_sampling:
            return self._sampler.collect(steps)
        return self._sampler.sample(logits, steps, self._grammars)

    def _run(
        self,
        steps: Sequence[SequenceStep],
        ops: StepOps,
        wanted: WantedRows,
        edits: AdapterEdits | None,
    ) -> tuple[SampledTokens, PromptReports]:
        self._fill_inputs(steps)
        token_ids = self._token_ids(sum(step.num_tokens for step in steps))
        logits = self._logits[: len(wanted.drawn)]
        reports = PromptReports()
        if wanted.has_reports:  # of more rows than the table of a step has
            rows = copy_to(self._pool.device, torch.tensor(wanted.rows, dtype=torch.int32))
            states = self._model.final_states(token_ids, ops, self._pool, rows, edits)
            states.logits(0, len(wanted.drawn), out=logits)
            reports = PromptReports.of(wanted, states)
        else:
            self._inputs.upload({"logit_rows": np.array(wanted.rows, dtype=np.int32)})
            rows = self._inputs.views["logit_rows"][: len(wanted.rows)]
            self._model.forward(token_ids, ops, self._pool, rows, out=logits, edits=edits)
        return self._sample(logits, wanted.drawn), reports

    def _decode(self, num_rows: int, has_lora: bool) -> None:
        """Enqueue what a graph holds: `num_rows` decodes, then their sampling."""
        logits = self._logits[:num_rows]
        ops = self._backend.static_ops(num_rows, has_lora=has_lora)
        self._model.forward(self._token_ids(num_rows), ops, self._pool, out=logits)
        if self._is_sampling:
            self._sampler.launch(logits)

    def _fill_inputs(self, steps: Sequence[SequenceStep]) -> None:
        token_ids: list[int] = []
        sources: list[int] = []
        for step in steps:
            token_ids += step.token_ids
            sources += [_KNOWN] * len(step.token_ids)
            if step.awaits_token:
                token_ids.append(0)
                sources.append(self._row_of[step.request_id])
        tables = {"token_ids": token_ids, "sources": sources}
        self._inputs.upload({n: np.array(t, dtype=np.int32) for n, t in tables.items()})

    def _token_ids(self, num_rows: int) -> torch.Tensor:
        """Return the input tokens, int64 `[num_rows]`; what the host does not know is put in."""
        known, sources = (self._inputs.views[n][:num_rows] for n in ("token_ids", "sources"))
        sampled = self._sampler.tokens[sources.clamp(min=0)]
        return torch.where(sources == _KNOWN, known, sampled)
