"""What the kernels take besides activations: the LoRA batch and the attention batch.

Both are built fresh each step from what is resident in that step, and never cached: a table that
outlives an adapter's pages answers one tenant with another's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch


@dataclass(frozen=True)
class PagedAdapter:
    """One adapter of a step: where its matrices lie and at which true ranks.

    `ranks`, `a_chunks` and `b_chunks` are `[L, 7]`, projections in the order q k v o gate up down.
    """

    pages: Sequence[int]
    ranks: Sequence[Sequence[int]]
    a_chunks: Sequence[Sequence[int]]
    b_chunks: Sequence[Sequence[int]]


@dataclass(frozen=True)
class LoRABatch:
    """Token rows grouped by adapter; segment `g` is adapter `g` of this step.

    Attributes:
        row_ids: int32 `[N]`, the token rows that have an adapter, segment by segment. Rows of the
            base model appear nowhere and cost nothing.
        seg_indptr: int32 `[G + 1]`; rows of segment `g` are `row_ids[indptr[g] : indptr[g + 1]]`.
        page_table: int32 `[G, P_max]`, page ids of adapter `g`, padded with 0 (never read).
        ranks: int32 `[L, G, 7]`, true rank per layer and projection, 0 for an absent module.
        a_chunks: int32 `[L, G, 7]`, first chunk of A (rows `[R, in]`) inside the adapter's pages.
        b_chunks: int32 `[L, G, 7]`, first chunk of B (rows `[R, out]`, scale folded in).
        chunk_elems: elements of a chunk; a chunk never crosses a page border.
    """

    row_ids: torch.Tensor
    seg_indptr: torch.Tensor
    page_table: torch.Tensor
    ranks: torch.Tensor
    a_chunks: torch.Tensor
    b_chunks: torch.Tensor
    chunk_elems: int

    @property
    def num_segments(self) -> int:
        return self.page_table.shape[0]


def build_lora_batch(
    adapters: Sequence[PagedAdapter], rows: Sequence[Sequence[int]], chunk_elems: int
) -> LoRABatch | None:
    """Group rows by adapter; None when no row has one.

    Args:
        adapters: the distinct adapters of this step.
        rows: for each adapter, the token rows that use it; at least one.
        chunk_elems: see `PoolLayout.chunk_elems`.
    """
    if not adapters:
        return None
    width = max(len(adapter.pages) for adapter in adapters)
    page_table = np.zeros((len(adapters), width), dtype=np.int32)
    for g, adapter in enumerate(adapters):
        page_table[g, : len(adapter.pages)] = adapter.pages
    tables = [
        np.array([getattr(adapter, name) for adapter in adapters], dtype=np.int32).swapaxes(0, 1)
        for name in ("ranks", "a_chunks", "b_chunks")
    ]
    ranks, a_chunks, b_chunks = (torch.from_numpy(np.ascontiguousarray(t)) for t in tables)
    row_ids = [row for segment in rows for row in segment]
    indptr = [0, *accumulate(len(segment) for segment in rows)]
    return LoRABatch(
        row_ids=torch.tensor(row_ids, dtype=torch.int32),
        seg_indptr=torch.tensor(indptr, dtype=torch.int32),
        page_table=torch.from_numpy(page_table),
        ranks=ranks,
        a_chunks=a_chunks,
        b_chunks=b_chunks,
        chunk_elems=chunk_elems,
    )


@dataclass(frozen=True)
class AttentionBatch:
    """Queries of a step over paged KV; sequences with one query come first.

    Attributes:
        query_indptr: int32 `[S + 1]`; queries of sequence `s` are rows `indptr[s] : indptr[s + 1]`.
        context_lens: int32 `[S]`, tokens of KV each sequence has after this step's write. The
            queries of a sequence are its last tokens.
        block_tables: int32 `[S, P_max]`, page ids in token order, padded with 0 (masked, never
            used).
        positions: int64 `[T]`, position of each query token in its sequence.
        slot_pages: int64 `[T]`, page that takes each token's K and V.
        slot_offsets: int64 `[T]`, token slot inside that page.
        num_decode: sequences with exactly one query; they are the first ones.
        max_context: the largest of `context_lens`, on the host (reading it would sync a device).
        seq_lens: `(num_queries, context_len)` per sequence, on the host.
    """

    query_indptr: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    positions: torch.Tensor
    slot_pages: torch.Tensor
    slot_offsets: torch.Tensor
    num_decode: int
    max_context: int
    seq_lens: tuple[tuple[int, int], ...]


def build_attention_batch(
    spans: Sequence[tuple[int, int]], block_tables: Sequence[Sequence[int]], page_tokens: int
) -> AttentionBatch:
    """Lay out the tokens of a step.

    Args:
        spans: per sequence `(start, num_new)`: tokens `[start, start + num_new)` are computed now;
            `[0, start)` have valid KV. Spans of one token come first.
        block_tables: page ids of each sequence, covering `start + num_new` tokens.
        page_tokens: tokens of a page.
    """
    num_new = [count for _, count in spans]
    num_decode = sum(count == 1 for count in num_new)
    assert all(count == 1 for count in num_new[:num_decode]), "spans of one token come first"
    positions = np.concatenate([np.arange(s, s + n, dtype=np.int64) for s, n in spans])
    width = max(len(pages) for pages in block_tables)
    tables = np.zeros((len(spans), width), dtype=np.int32)
    for s, pages in enumerate(block_tables):
        tables[s, : len(pages)] = pages
    seq_of_row = np.repeat(np.arange(len(spans)), num_new)
    slot_pages = tables[seq_of_row, positions // page_tokens].astype(np.int64)
    contexts = [start + count for start, count in spans]
    return AttentionBatch(
        query_indptr=torch.tensor([0, *accumulate(num_new)], dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.from_numpy(tables),
        positions=torch.from_numpy(positions),
        slot_pages=torch.from_numpy(slot_pages),
        slot_offsets=torch.from_numpy(positions % page_tokens),
        num_decode=num_decode,
        max_context=max(contexts),
        seq_lens=tuple(zip(num_new, contexts, strict=True)),
    )
