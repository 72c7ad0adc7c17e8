"""Computing a plan: forward batch and LoRA batch in, one token per sampled sequence out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.batch import (
    LoRABatch,
    PagedAdapter,
    build_attention_batch,
    build_lora_batch,
)
from loraplex_kernels.ops import choose_backend
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, SequenceStep, StepResult
from loraplex_server.model.sampler import sample
from loraplex_server.model.transformer import Transformer

_NOT_FINITE = (
    "the model produced values that are not finite; if only this adapter does, its weights overflow"
)


class Runner:
    """Owned by the engine step. Holds no state of any sequence: a plan says everything."""

    def __init__(self, model: Transformer, pool: PagePool) -> None:
        self._model = model
        self._pool = pool
        self._backend = choose_backend(model.device)

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute every sequence of the plan and draw the tokens it asks for."""
        steps = plan.sequences
        attention = build_attention_batch(
            spans=[(step.start, len(step.token_ids)) for step in steps],
            block_tables=[step.block_table for step in steps],
            page_tokens=self._pool.layout.page_tokens,
        )
        token_ids = torch.tensor([t for step in steps for t in step.token_ids], dtype=torch.int64)
        ends = attention.query_indptr[1:].tolist()
        sampled = [
            (step, end - 1) for step, end in zip(steps, ends, strict=True) if step.is_sampled
        ]
        logits = self._model.forward(
            token_ids,
            self._backend.prepare(attention, self._lora_batch(plan)),
            self._pool,
            torch.tensor([row for _, row in sampled], dtype=torch.int64),
        )
        return _draw(logits, [step for step, _ in sampled])

    def _lora_batch(self, plan: Plan) -> LoRABatch | None:
        rows = _rows_by_adapter(plan.sequences)
        adapters = [
            PagedAdapter(
                pages=planned.pages,
                ranks=planned.layout.ranks,
                a_chunks=planned.layout.a_chunks,
                b_chunks=planned.layout.b_chunks,
            )
            for planned in (plan.adapters[adapter_id] for adapter_id in rows)
        ]
        return build_lora_batch(adapters, list(rows.values()), self._pool.layout.chunk_elems)


def _draw(logits: torch.Tensor, steps: Sequence[SequenceStep]) -> StepResult:
    """Draw a token of each row, but none from a row that is not finite.

    An adapter's finite weights can still overflow; its request fails, its neighbours do not.
    """
    if not steps:
        return StepResult({})
    is_sound = torch.isfinite(logits.amax(-1)).tolist()
    if not all(is_sound):
        logits = logits[torch.tensor(is_sound)]
    sound = [step for step, ok in zip(steps, is_sound, strict=True) if ok]
    tokens = {s.request_id: t for s, t in zip(sound, sample(logits, sound), strict=True)}
    failed = [step.request_id for step, ok in zip(steps, is_sound, strict=True) if not ok]
    return StepResult(tokens, dict.fromkeys(failed, _NOT_FINITE))


def _rows_by_adapter(steps: Sequence[SequenceStep]) -> dict[str, list[int]]:
    """Return the token rows of each adapter, in the order the plan lays tokens out."""
    rows: dict[str, list[int]] = {}
    at = 0
    for step in steps:
        stop = at + len(step.token_ids)
        if step.adapter_id is not None:
            rows.setdefault(step.adapter_id, []).extend(range(at, stop))
        at = stop
    return rows
