"""Launching paged attention on a GPU, or under the Triton interpreter.

Nothing here waits for the device or reads its memory, and every tensor can be allocated before, so
that a CUDA graph may hold all of it. Import it only where Triton is to be used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loraplex_kernels.arithmetic import STRICT
from loraplex_kernels.attention_triton import (
    COMBINE_OPTIONS,
    DECODE_OPTIONS,
    combine_constants,
    combine_splits_kernel,
    decode_attention_kernel,
    decode_constants,
    prefill_attention_kernel,
    prefill_constants,
    prefill_options,
)
from loraplex_kernels.attention_work import AttentionTables, AttentionTiling


@dataclass(frozen=True)
class DecodeScratch:
    """Where decode leaves what each item computed until it is combined; reused by every layer.

    Attributes:
        partial: float32 `[max_items, heads, head_dim]`.
        stats: float32 `[max_items, heads, 2]`, peak score and sum of weights.
    """

    partial: torch.Tensor
    stats: torch.Tensor

    @classmethod
    def allocate(
        cls, max_items: int, num_heads: int, head_dim: int, device: torch.device
    ) -> DecodeScratch:
        def empty(width: int) -> torch.Tensor:
            shape = (max_items, num_heads, width)
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(empty(head_dim), empty(2))


def decode_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    tables: AttentionTables,
    scratch: DecodeScratch,
    *,
    scale: float,
    tiling: AttentionTiling,
    num_programs: int,
    out: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Attend for the sequences of a step that have one query; see `reference.paged_attention`.

    Args:
        query: `[T, heads, head_dim]`, contiguous but for the rows.
        kv: `[P, 2, page_tokens, kv_heads, head_dim]`, this step's K and V already written.
        tables: work of the step; its lengths bound the launch, its counts say what is valid.
        scratch: at least as many items as `tables.decode_items`.
        scale: factor on the scores; positive.
        tiling: the one that the work was built with.
        num_programs: programs that share the items, a few for each multiprocessor.
        out: `[T, heads, head_dim]`; only rows of these sequences are written.
        window: tokens a query sees, itself included; None for all.

    Returns:
        `out`.
    """
    _, heads, head_dim = query.shape
    kv_heads = kv.shape[3]
    num_items, num_sequences = len(tables.decode_items), len(tables.item_start) - 1
    if not num_items:
        return out
    assert kv.is_contiguous(), "one layer of the pool"
    assert len(scratch.partial) >= num_items, "scratch is too small"
    decode_attention_kernel[(min(num_programs, num_items * kv_heads),)](
        scratch.partial,
        scratch.stats,
        query,
        kv,
        tables.decode_items,
        tables.counts,
        tables.pages,
        tables.page_start,
        tables.context_lens,
        tables.query_start,
        scale * math.log2(math.e),
        query.stride(0),
        **decode_constants(tiling, heads, kv.shape, window),
        **DECODE_OPTIONS,
        **STRICT,
    )
    combine_splits_kernel[(min(num_sequences, len(query)), heads)](
        out,
        scratch.partial,
        scratch.stats,
        tables.item_start,
        tables.counts,
        tables.query_start,
        out.stride(0),
        **combine_constants(tiling, heads, head_dim),
        **COMBINE_OPTIONS,
        **STRICT,
    )
    return out


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    tables: AttentionTables,
    *,
    scale: float,
    tiling: AttentionTiling,
    out: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Attend for the sequences of a step that have several queries, as `decode_attention` does.

    `tables.prefill_items` should be cut to the step: each of them starts programs.
    """
    heads, kv_heads = query.shape[1], kv.shape[3]
    if not len(tables.prefill_items):
        return out
    assert kv.is_contiguous(), "one layer of the pool"
    prefill_attention_kernel[(len(tables.prefill_items) * kv_heads,)](
        out,
        query,
        kv,
        tables.prefill_items,
        tables.counts,
        tables.pages,
        tables.page_start,
        tables.context_lens,
        tables.query_start,
        scale * math.log2(math.e),
        query.stride(0),
        out.stride(0),
        **prefill_constants(tiling, heads, kv.shape, window),
        **prefill_options(tiling),
        **STRICT,
    )
    return out
