"""Paged attention in Triton: a split-KV kernel for decode, a varlen kernel for prefill.

`reference.paged_attention` says what is computed, `attention_launch.py` launches it. KV blocks and
query tiles start at multiples of their size, counted from a sequence's first token, and a block
that a row does not see leaves every bit of it alone; so a row's result depends on its own sequence
only: neither on its company nor on how its prompt was cut into chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import triton
import triton.language as tl

from loraplex_kernels.aot import AotCase, ModelShape
from loraplex_kernels.arithmetic import STRICT, dot, narrow
from loraplex_kernels.attention_work import AttentionTiling

DECODE_OPTIONS: Final = {"num_warps": 4, "num_stages": 3}
COMBINE_OPTIONS: Final = {"num_warps": 2}

#: Splits that the combine kernel merges at a time.
_SPLIT_TILE: Final = 8


@triton.jit
def _attend(
    acc,
    peak,
    total,
    q,
    position,
    kv,
    pages,
    start,
    stop,
    scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Online softmax over KV tokens `[start, stop)`, `start` a multiple of `BLOCK`.

    `acc, peak, total = sum_j 2^(s_j - peak) v_j, max_j s_j, sum_j 2^(s_j - peak)` with
    `s_j = scale * q k_j` over `position - WINDOW < j <= position` (WINDOW 0: no lower bound).
    Without `IS_MASKED` every row sees every token, and `stop` is a multiple of `BLOCK`, too; the
    bits are those of the masked form, which is why no compiler may choose what to fuse here.
    `kv` points at this KV head; `pages` at the sequence's block table; `q` is `[M, D]`.
    """
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    dim = tl.arange(0, D)
    # Each block's page ids are loaded a block ahead, so that K and V wait for no other load and
    # the compiler can keep several blocks of them in flight.
    local = tl.arange(0, BLOCK)
    page = tl.load(pages + (start + local) // PAGE_TOKENS, mask=start + local < stop, other=0)
    for first in tl.range(start, stop, BLOCK):
        token = first + local
        ahead = first + BLOCK
        if BLOCK % PAGE_TOKENS == 0:  # where a token lies in its page is the same in every block
            slot = local % PAGE_TOKENS
            page_index = ahead // PAGE_TOKENS + local // PAGE_TOKENS
        else:
            slot = token % PAGE_TOKENS
            page_index = (ahead + local) // PAGE_TOKENS
        row = page.to(tl.int64) * (2 * PAGE_TOKENS * ROW) + slot * ROW
        page = tl.load(pages + page_index, mask=ahead + local < stop, other=0)
        loaded = (dim < HEAD_DIM)[None, :]
        if IS_MASKED:
            loaded &= (token < stop)[:, None]
        at = kv + row[:, None] + dim[None, :]
        k = tl.load(at, mask=loaded, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK), tl.float32))
        if IS_MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOW > 0:
                seen &= token[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        # A row that has seen nothing yet has peak -inf: subtract 0 from its -inf instead.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(tl.fma(scores, scale, -base[:, None]))
        shrink = tl.exp2(peak - base)
        v = tl.load(at + PAGE_TOKENS * ROW, mask=loaded, other=0.0)
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        acc = dot(narrow(weight, v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit
def decode_attention_kernel(
    partial,
    stats,
    query,
    kv,
    items,
    counts,
    pages,
    page_start,
    context_lens,
    query_start,
    scale,
    query_stride,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`partial, stats = sum_j 2^(s_j - m) v_j, (m, sum_j 2^(s_j - m))` over one split of one KV.

    One query per sequence; the query heads of a KV head are the rows of one tile. Programs stride
    over (item, KV head); neighbours read neighbouring heads of the same pages.
    """
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    group = tl.arange(0, HEAD_TILE)
    dim = tl.arange(0, D)
    inside = (group < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]
    num_work = tl.load(counts) * KV_HEADS
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), num_stages=1):
        item = work // KV_HEADS
        kv_head = work % KV_HEADS
        sequence = tl.load(items + 2 * item)
        split = tl.load(items + 2 * item + 1)
        context = tl.load(context_lens + sequence)
        row = tl.load(query_start + sequence).to(tl.int64)
        start = split * SPLIT
        stop = tl.minimum(start + SPLIT, context)
        if WINDOW > 0:
            start = tl.maximum(start, tl.maximum(context - WINDOW, 0) // BLOCK * BLOCK)
        heads = kv_head * GROUPS + group
        q_at = query + row * query_stride + heads[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(q_at, mask=inside, other=0.0)
        acc, peak, total = _attend(
            tl.zeros((HEAD_TILE, D), tl.float32),
            tl.full((HEAD_TILE,), float("-inf"), tl.float32),
            tl.zeros((HEAD_TILE,), tl.float32),
            q,
            tl.full((HEAD_TILE,), context - 1, tl.int32),
            kv + kv_head * HEAD_DIM,
            pages + tl.load(page_start + sequence),
            start,
            stop,
            scale,
            WINDOW,
            KV_HEADS,
            HEAD_DIM,
            PAGE_TOKENS,
            D,
            BLOCK,
            True,
        )
        result = item.to(tl.int64) * HEADS + heads
        tl.store(partial + result[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
        tl.store(stats + 2 * result, peak, mask=group < GROUPS)
        tl.store(stats + 2 * result + 1, total, mask=group < GROUPS)


@triton.jit
def combine_splits_kernel(
    out,
    partial,
    stats,
    item_start,
    counts,
    query_start,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i`, `m = max m_i`, splits in order.

    One program per (sequence that decodes, head); `SPLITS` are merged at a time.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    if sequence >= tl.load(counts + 1):
        return
    dim = tl.arange(0, D)
    first = tl.load(item_start + sequence)
    stop = tl.load(item_start + sequence + 1)
    acc = tl.zeros((D,), tl.float32)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for chunk in tl.range(first, stop, SPLITS):
        item = chunk + tl.arange(0, SPLITS)
        row = item.to(tl.int64) * HEADS + head
        peaks = tl.load(stats + 2 * row, mask=item < stop, other=float("-inf"))
        totals = tl.load(stats + 2 * row + 1, mask=item < stop, other=0.0)
        inside = (item < stop)[:, None] & (dim < HEAD_DIM)[None, :]
        parts = tl.load(partial + row[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(peaks - base)
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight * totals, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * parts, 0)
        peak = new_peak
    at = tl.load(query_start + sequence).to(tl.int64) * out_stride + head * HEAD_DIM + dim
    tl.store(out + at, narrow(acc / total, out.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def prefill_attention_kernel(
    out,
    query,
    kv,
    items,
    counts,
    pages,
    page_start,
    context_lens,
    query_start,
    scale,
    query_stride,
    out_stride,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out = softmax(scale * q k^T + causal and window mask) v` for a tile of queries.

    One program per (item, KV head). Row `r` of the tile is query `r // GROUPS` of the tile with
    head `r % GROUPS` of the KV head, so that K and V are read once for all heads that share them.
    A tile starts at a multiple of `QUERY_TILE`: a query has one row, however its prompt is cut.
    """
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    item = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    if item >= tl.load(counts + 2):
        return
    sequence = tl.load(items + 2 * item)
    first_position = tl.load(items + 2 * item + 1) * QUERY_TILE
    context = tl.load(context_lens + sequence)
    stop = tl.minimum(first_position + QUERY_TILE, context)
    # Token row of position 0, were it part of this step.
    row_base = tl.load(query_start + sequence + 1) - context
    start_position = tl.load(query_start + sequence) - row_base

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    position = first_position + row // GROUPS
    is_query = (row < QUERY_TILE * GROUPS) & (position >= start_position) & (position < context)
    inside = is_query[:, None] & (dim < HEAD_DIM)[None, :]
    token_row = (row_base + position).to(tl.int64)
    column = (kv_head * GROUPS + row % GROUPS)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(query + token_row[:, None] * query_stride + column, mask=inside, other=0.0)

    head_kv = kv + kv_head * HEAD_DIM
    head_pages = pages + tl.load(page_start + sequence)
    acc = tl.zeros((ROWS, D), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # Blocks that some row sees in part lie at both ends; between them no mask is needed.
    full_start = 0
    full_stop = (first_position + 1) // BLOCK * BLOCK
    if WINDOW > 0:
        start = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK * BLOCK
        full_start = tl.cdiv(tl.maximum(stop - WINDOW, 0), BLOCK) * BLOCK
        full_stop = tl.maximum(full_stop, start)
        full_start = tl.minimum(full_start, full_stop)
        acc, peak, total = _attend(
            acc, peak, total, q, position, head_kv, head_pages, start, full_start, scale,
            WINDOW, KV_HEADS, HEAD_DIM, PAGE_TOKENS, D, BLOCK, True,
        )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, q, position, head_kv, head_pages, full_start, full_stop, scale,
        WINDOW, KV_HEADS, HEAD_DIM, PAGE_TOKENS, D, BLOCK, False,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, q, position, head_kv, head_pages, full_stop, stop, scale,
        WINDOW, KV_HEADS, HEAD_DIM, PAGE_TOKENS, D, BLOCK, True,
    )  # fmt: skip
    total = tl.where(is_query, total, 1.0)
    result = narrow(acc / total[:, None], out.dtype.element_ty)
    tl.store(out + token_row[:, None] * out_stride + column, result, mask=inside)


def decode_constants(
    tiling: AttentionTiling, heads: int, kv_shape: Sequence[int], window: int | None
) -> dict[str, int]:
    """Return the constants of `decode_attention_kernel`; `kv_shape` as `PagePool.kv` has it."""
    return {
        **_shape_constants(tiling, heads, kv_shape, window),
        "HEAD_TILE": tiling.head_tile,
        "SPLIT": tiling.split_tokens,
        "BLOCK": tiling.decode_tokens,
    }


def combine_constants(tiling: AttentionTiling, heads: int, head_dim: int) -> dict[str, int]:
    """Return the constants of `combine_splits_kernel`."""
    padded = tiling.head_dim_padded
    return {"HEADS": heads, "HEAD_DIM": head_dim, "D": padded, "SPLITS": _SPLIT_TILE}


def prefill_constants(
    tiling: AttentionTiling, heads: int, kv_shape: Sequence[int], window: int | None
) -> dict[str, int]:
    """Return the constants of `prefill_attention_kernel`."""
    return {
        **_shape_constants(tiling, heads, kv_shape, window),
        "QUERY_TILE": tiling.query_tile,
        "ROWS": tiling.prefill_rows,
        "BLOCK": tiling.prefill_tokens,
    }


def _shape_constants(
    tiling: AttentionTiling, heads: int, kv_shape: Sequence[int], window: int | None
) -> dict[str, int]:
    return {
        "WINDOW": window or 0,
        "HEADS": heads,
        "KV_HEADS": kv_shape[3],
        "HEAD_DIM": kv_shape[4],
        "PAGE_TOKENS": kv_shape[2],
        "D": tiling.head_dim_padded,
    }


def prefill_options(tiling: AttentionTiling) -> dict[str, int]:
    """Return the compile options of `prefill_attention_kernel`: 64 sums of a tile per thread."""
    is_large = tiling.prefill_rows * tiling.head_dim_padded >= 128 * 128
    return {"num_warps": 8 if is_large else 4, "num_stages": 2}


def aot_cases(shape: ModelShape) -> list[AotCase]:
    """Return the attention kernels that serving a model of this shape in bfloat16 launches."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    kv_shape = (0, 2, shape.page_tokens, kv_heads, head_dim)
    tilings = {
        capability: AttentionTiling.of(
            heads, kv_heads, head_dim, elem_bytes=2, capability=capability
        )
        for capability in (80, 90)
    }
    if tilings[80] == tilings[90]:
        del tilings[90]
    case = functools.partial(AotCase.of_launch, types=_TYPES, weights="kv")
    constants = combine_constants(tilings[80], heads, head_dim)
    options = {**COMBINE_OPTIONS, **STRICT}
    cases = [case("combine_splits", combine_splits_kernel, constants, options)]
    for suffix, window in (("", None), (" window", 4096)):
        constants = decode_constants(tilings[80], heads, kv_shape, window)
        name = f"decode_attention{suffix}"
        options = {**DECODE_OPTIONS, **STRICT}
        cases.append(case(name, decode_attention_kernel, constants, options))
        for capability, tiling in tilings.items():
            constants = prefill_constants(tiling, heads, kv_shape, window)
            name = f"prefill_attention{suffix}"
            options = {**prefill_options(tiling), **STRICT}
            cases.append(
                case(name, prefill_attention_kernel, constants, options, min_capability=capability)
            )
    return cases


#: Run-time arguments that are neither int32 tables nor of the model's dtype.
_TYPES: Final = {
    **dict.fromkeys(("out", "query", "kv"), "*bf16"),
    **dict.fromkeys(("partial", "stats"), "*fp32"),
    **dict.fromkeys(("query_stride", "out_stride"), "i32"),
    "scale": "fp32",
}
