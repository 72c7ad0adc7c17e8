"""What the kernels take besides activations: the LoRA batch and the attention batch.

Both are built fresh each step from what is resident in that step, and never cached: a table that
outlives an adapter's pages answers one tenant with another's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class PagedAdapter:
    """One adapter of a step: where its matrices lie and at which true ranks.

    All tables are `[L, 7]`, projections in the order q k v o gate up down. Those of a resident
    adapter never change: made int32 arrays once, they need no conversion each step.

    Attributes:
        pages: page ids in order, `[n]`.
        ranks: true ranks, 0 for an absent module.
        a_chunks: first chunk of A inside the adapter's pages.
        b_chunks: first chunk of B.
        scale_chunks: first chunk of a module's output scale: two vectors as long as its output,
            each from a chunk on, whose sum it is; -1 for none. A module of rank 0 may have one.
        bias_chunks: the same for its bias, one vector.
        weight: factor on `B A x`, for the rows of this segment.
        a_ranks: rows of A that lie in these pages, where they are cut over devices; else `ranks`.
    """

    pages: npt.ArrayLike
    ranks: npt.ArrayLike
    a_chunks: npt.ArrayLike
    b_chunks: npt.ArrayLike
    scale_chunks: npt.ArrayLike | None = None
    bias_chunks: npt.ArrayLike | None = None
    weight: float = 1.0
    a_ranks: npt.ArrayLike | None = None


@dataclass(frozen=True)
class LoRABatch:
    """Token rows grouped by adapter; segment `g` is adapter `g` of this step. No row is in two.

    Attributes:
        row_ids: int32 `[N]`, the token rows that have an adapter, segment by segment. Rows of the
            base model appear nowhere and cost nothing.
        seg_indptr: int32 `[G + 1]`; rows of segment `g` are `row_ids[indptr[g] : indptr[g + 1]]`.
        page_table: int32 `[G, P_max]`, page ids of adapter `g`, padded with 0 (never read).
        ranks: int32 `[L, G, 7]`, true rank per layer and projection, 0 for an absent module.
        a_chunks: int32 `[L, G, 7]`, first chunk of A (rows `[R, in]`) inside the adapter's pages.
        b_chunks: int32 `[L, G, 7]`, first chunk of B (rows `[R, out]`, scale folded in).
        chunk_elems: elements of a chunk; a chunk never crosses a page border.
        scale_chunks: int32 `[L, G, 7]`, first chunk of each module's output scale, -1 for none.
            None, as is `bias_chunks`, when no adapter of the step has a scale or a bias.
        bias_chunks: the same for the biases.
        weights: float32 `[G]`, factors on each segment's `B A x`; None when all are 1.
        a_ranks: int32 `[L, G, 7]`, rows of A in the pages: a share of `ranks` where A is cut over
            devices.
    """

    row_ids: torch.Tensor
    seg_indptr: torch.Tensor
    page_table: torch.Tensor
    ranks: torch.Tensor
    a_chunks: torch.Tensor
    b_chunks: torch.Tensor
    chunk_elems: int
    scale_chunks: torch.Tensor | None = None
    bias_chunks: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    a_ranks: torch.Tensor | None = None

    @property
    def own_ranks(self) -> torch.Tensor:
        """Rows of A in these pages, int32 `[L, G, 7]`: all of them where there is one device."""
        return self.ranks if self.a_ranks is None else self.a_ranks

    @property
    def num_segments(self) -> int:
        return self.page_table.shape[0]


def build_lora_batch(
    adapters: Sequence[PagedAdapter], rows: Sequence[Sequence[int]], chunk_elems: int
) -> LoRABatch | None:
    """Group rows by adapter; None when no row has one.

    Args:
        adapters: the distinct adapters of this step; one of several weights comes as often.
        rows: for each adapter, the token rows that use it; at least one.
        chunk_elems: see `PoolLayout.chunk_elems`.
    """
    if not adapters:
        return None
    pages = [np.asarray(adapter.pages, dtype=np.int32) for adapter in adapters]
    page_table = np.zeros((len(adapters), max(map(len, pages))), dtype=np.int32)
    for g, page_ids in enumerate(pages):
        page_table[g, : len(page_ids)] = page_ids
    lengths = [len(segment) for segment in rows]
    row_ids = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=sum(lengths))
    scale_chunks, bias_chunks = _stack_epilogues(adapters)
    return LoRABatch(
        row_ids=torch.from_numpy(row_ids),
        seg_indptr=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        page_table=torch.from_numpy(page_table),
        ranks=_stack([adapter.ranks for adapter in adapters]),
        a_chunks=_stack([adapter.a_chunks for adapter in adapters]),
        b_chunks=_stack([adapter.b_chunks for adapter in adapters]),
        chunk_elems=chunk_elems,
        scale_chunks=scale_chunks,
        bias_chunks=bias_chunks,
        weights=_weights(adapters),
        a_ranks=_stack_a_ranks(adapters),
    )


def _stack_a_ranks(adapters: Sequence[PagedAdapter]) -> torch.Tensor | None:
    cut = [adapter.a_ranks for adapter in adapters if adapter.a_ranks is not None]
    assert len(cut) in (0, len(adapters)), "all adapters of a pool are cut alike"
    return _stack(cut) if cut else None


def _weights(adapters: Sequence[PagedAdapter]) -> torch.Tensor | None:
    weights = [adapter.weight for adapter in adapters]
    return None if weights.count(1.0) == len(weights) else torch.tensor(weights)


def _stack(tables: Sequence[npt.ArrayLike]) -> torch.Tensor:
    """Stack `[L, 7]` of each adapter to int32 `[L, G, 7]`."""
    stacked = np.stack([np.asarray(table, dtype=np.int32) for table in tables], axis=1)
    return torch.from_numpy(np.ascontiguousarray(stacked))


def _stack_epilogues(
    adapters: Sequence[PagedAdapter],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    scales = [adapter.scale_chunks for adapter in adapters]
    biases = [adapter.bias_chunks for adapter in adapters]
    if all(chunks is None for chunks in (*scales, *biases)):
        return None, None
    absent = np.full_like(np.asarray(adapters[0].ranks, dtype=np.int32), -1)
    scale_chunks, bias_chunks = (
        _stack([absent if chunks is None else chunks for chunks in tables])
        for tables in (scales, biases)
    )
    return scale_chunks, bias_chunks


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
