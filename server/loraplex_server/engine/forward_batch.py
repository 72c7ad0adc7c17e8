"""A plan as the kernels take it: the attention batch and the LoRA batch, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from loraplex_memory.adapter_spec import KV_PREFIX, SOFT_PROMPT, bias, out_scale
from loraplex_memory.layout import PROJECTIONS, PoolLayout, Projection
from loraplex_scheduler.plan import Plan, SequenceStep
from loraplex_server.model.adapter_edits import EditedRows

#: The id of an adapter and its weight: what the rows of a segment have in common.
Weighted = tuple[str, float]


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
        """Return which rows use which adapter; None when none does.

        Of a mixture it is the first adapter; `more_lora` has the others.
        """
        # Only what this plan names is kept: an adapter that left is forgotten at once.
        self._tables = {
            adapter_id: self._tables_of(adapter_id, adapter.layout)
            for adapter_id, adapter in plan.adapters.items()
            if adapter.layout.changes_linears
        }
        return self._batch(plan, rows_by_adapter(plan.sequences))

    def more_lora(self, plan: Plan) -> list[LoRABatch]:
        """Return the batches of the other adapters of mixtures; to be called after `lora`.

        The first one has the second adapter of each mixture, and so on.
        """
        longest = max((len(step.request.more_adapters) for step in plan.sequences), default=0)
        batches = (
            self._batch(plan, rows_by_adapter(plan.sequences, index))
            for index in range(1, longest + 1)
        )
        return [batch for batch in batches if batch is not None]

    def _batch(self, plan: Plan, rows: Mapping[Weighted, Sequence[int]]) -> LoRABatch | None:
        own = {key: rows[key] for key in rows if key[0] in self._tables}
        adapters = [
            self._tables[adapter_id].paged(plan.adapters[adapter_id].pages, weight)
            for adapter_id, weight in own
        ]
        return build_lora_batch(adapters, list(own.values()), self._layout.chunk_elems)

    def edits(self, plan: Plan, logit_rows: Sequence[int]) -> list[EditedRows]:
        """Return what adapters of the plan change besides linears, for rows that it concerns.

        Args:
            logit_rows: token rows whose logits are wanted, in their order.
        """
        if not any(adapter.layout.needs_edits for adapter in plan.adapters.values()):
            return []
        place = {row: at for at, row in enumerate(logit_rows)}
        virtual = _virtual_tokens(plan.sequences)
        edited = []
        for (adapter_id, _), rows in rows_by_adapter(plan.sequences).items():
            adapter = plan.adapters[adapter_id]
            own = virtual.get(adapter_id, [])
            if not own and not _edits_text(adapter.layout):
                continue
            edited.append(
                EditedRows(
                    adapter.layout,
                    adapter.pages,
                    rows,
                    [place[row] for row in rows if row in place],
                    virtual_rows=[row for row, _ in own],
                    virtual_idxs=[idx for _, idx in own],
                )
            )
        return edited

    def _tables_of(self, adapter_id: str, layout: AdapterLayout) -> _LayoutTables:
        known = self._tables.get(adapter_id)
        return known if known and known.layout is layout else _LayoutTables.of(layout)


@dataclass(frozen=True)
class _LayoutTables:
    """A layout's tables as arrays, `[L, 7]` each; they follow from content, not from residency."""

    layout: AdapterLayout
    ranks: npt.NDArray[np.int32]
    a_ranks: npt.NDArray[np.int32] | None
    a_chunks: npt.NDArray[np.int32]
    b_chunks: npt.NDArray[np.int32]
    scale_chunks: npt.NDArray[np.int32] | None
    bias_chunks: npt.NDArray[np.int32] | None

    @classmethod
    def of(cls, layout: AdapterLayout) -> Self:
        return cls(
            layout,
            ranks=np.array(layout.ranks, dtype=np.int32),
            a_ranks=_cut_ranks(layout),
            a_chunks=np.array(layout.a_chunks, dtype=np.int32),
            b_chunks=np.array(layout.b_chunks, dtype=np.int32),
            scale_chunks=_part_chunks(layout, out_scale),
            bias_chunks=_part_chunks(layout, bias),
        )

    def paged(self, pages: Sequence[int], weight: float) -> PagedAdapter:
        """Return the adapter as it lies in these pages, without the parts of the whole model."""
        return PagedAdapter(
            pages[: self.layout.num_layer_pages],
            self.ranks,
            self.a_chunks,
            self.b_chunks,
            self.scale_chunks,
            self.bias_chunks,
            weight,
            self.a_ranks,
        )


def _cut_ranks(layout: AdapterLayout) -> npt.NDArray[np.int32] | None:
    """Return the rows of A, `[L, 7]`, where they are cut over devices."""
    return np.array(layout.a_ranks, dtype=np.int32) if layout.pool.num_ranks > 1 else None


def _part_chunks(
    layout: AdapterLayout, part_of: Callable[[Projection], str]
) -> npt.NDArray[np.int32] | None:
    """Return the first chunk of a part of linears, `[L, 7]`, -1 for none; None if all are."""
    starts = [
        layout.layer_part(name)
        if (part := layout.part(name)) and layout.is_epilogue(part)
        else None
        for name in map(part_of, PROJECTIONS)
    ]
    if all(start is None for start in starts):
        return None
    absent = (-1,) * layout.pool.geometry.num_layers
    return np.array([start or absent for start in starts], dtype=np.int32).T


def _edits_text(layout: AdapterLayout) -> bool:
    """Whether an adapter edits rows that are not of its virtual tokens."""
    return any(
        not layout.is_epilogue(part) and part.name not in (SOFT_PROMPT, KV_PREFIX)
        for part in layout.parts
    )


def _virtual_tokens(steps: Sequence[SequenceStep]) -> dict[str, list[tuple[int, int]]]:
    """Return each adapter's rows of virtual tokens, and which of them each is."""
    rows: dict[str, list[tuple[int, int]]] = {}
    at = 0
    for step in steps:
        num_virtual = step.request.num_virtual - step.start
        if num_virtual > 0 and step.adapter_id is not None:
            own = rows.setdefault(step.adapter_id, [])
            own += [(at + i, step.start + i) for i in range(min(num_virtual, step.num_tokens))]
        at += step.num_tokens
    return rows


def rows_by_adapter(steps: Sequence[SequenceStep], index: int = 0) -> dict[Weighted, list[int]]:
    """Return the token rows of each adapter, in the order the plan lays tokens out.

    Rows before a request's `adapter_start` are the base's.

    Args:
        index: which adapter of each request, where it has so many.
    """
    rows: dict[Weighted, list[int]] = {}
    at = 0
    for step in steps:
        stop = at + step.num_tokens
        request = step.request
        manifest, weight = request.adapter, request.adapter_weight
        if index:
            more = request.more_adapters
            manifest, weight = more[index - 1] if index <= len(more) else (None, 1.0)
        if manifest is not None:
            first = at + max(0, request.adapter_start - step.start)
            if first < stop:
                rows.setdefault((manifest.adapter_id, weight), []).extend(range(first, stop))
        at = stop
    return rows
