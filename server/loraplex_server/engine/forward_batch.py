"""A plan as the kernels take it: the attention batch and the LoRA batch, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from loraplex_kernels.batch import (
    AttentionBatch,
    LoRABatch,
    PagedAdapter,
    build_attention_batch,
    build_lora_batch,
)
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.plan import Plan, SequenceStep


class BatchBuilder:
    """Owned by a runner; builds both batches anew for each plan."""

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._tables: dict[str, _LayoutTables] = {}

    def attention(self, plan: Plan) -> AttentionBatch:
        return build_attention_batch(
            spans=[(step.start, step.num_tokens) for step in plan.sequences],
            block_tables=[step.block_table for step in plan.sequences],
            page_tokens=self._layout.page_tokens,
        )

    def lora(self, plan: Plan) -> LoRABatch | None:
        """Return which rows use which adapter; None when none does."""
        rows = _rows_by_adapter(plan.sequences)
        # Only what this plan names is kept: an adapter that left is forgotten at once.
        self._tables = {
            adapter_id: self._tables_of(adapter_id, plan.adapters[adapter_id].layout)
            for adapter_id in rows
        }
        adapters = [
            PagedAdapter(plan.adapters[adapter_id].pages, t.ranks, t.a_chunks, t.b_chunks)
            for adapter_id, t in self._tables.items()
        ]
        return build_lora_batch(adapters, list(rows.values()), self._layout.chunk_elems)

    def _tables_of(self, adapter_id: str, layout: AdapterLayout) -> _LayoutTables:
        known = self._tables.get(adapter_id)
        return known if known and known.layout is layout else _LayoutTables.of(layout)


@dataclass(frozen=True)
class _LayoutTables:
    """A layout's tables as arrays, `[L, 7]` each; they follow from content, not from residency."""

    layout: AdapterLayout
    ranks: npt.NDArray[np.int32]
    a_chunks: npt.NDArray[np.int32]
    b_chunks: npt.NDArray[np.int32]

    @classmethod
    def of(cls, layout: AdapterLayout) -> Self:
        tables = (layout.ranks, layout.a_chunks, layout.b_chunks)
        return cls(layout, *(np.array(table, dtype=np.int32) for table in tables))


def _rows_by_adapter(steps: Sequence[SequenceStep]) -> dict[str, list[int]]:
    """Return the token rows of each adapter, in the order the plan lays tokens out."""
    rows: dict[str, list[int]] = {}
    at = 0
    for step in steps:
        stop = at + step.num_tokens
        if step.adapter_id is not None:
            rows.setdefault(step.adapter_id, []).extend(range(at, stop))
        at = stop
    return rows
