"""The first half of LoRA over paged weights of ragged ranks (SGMV), driven by a flat work list.

    planes[p, t, r] = sum of A_g[r, k] x[t, k] over k in part p

Every program strides the list that `lora_work` builds, whose bounds are in device memory: one
captured graph serves any adapters at any mix of ranks. Weights are read through page ids
(`lora_elements`), at their true rank. Nothing depends on company: K is cut by shape, parts are
added in order of position, every product is the same tensor-core instruction on a tile of 16 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_kernels.aot import AotCase, ModelShape
from loraplex_kernels.arithmetic import dot
from loraplex_kernels.lora_cases import lora_case, site_variants
from loraplex_kernels.lora_elements import ROWS, SPAN, load_elements, load_item
from loraplex_kernels.lora_shape import LoRAShape


@triton.jit
def _multiply_part(
    x_at,
    pool_ptr,
    pages,
    weight_start,
    row_mask,
    rank_mask,
    part,
    K: tl.constexpr,
    PITCH: tl.constexpr,
    PART: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK_TILE: tl.constexpr,
    IS_TILED: tl.constexpr,
):
    """`acc[t, r] = sum of A[r, k] x[t, k]` over `k` of one part, in float32 and in order of `k`."""
    k0 = part * PART
    k_len = tl.minimum(PART, K - k0)
    cols = tl.arange(0, BLOCK_K)
    start = weight_start + tl.arange(0, RANK_TILE) * PITCH + k0
    first_page = start // PAGE_ELEMS
    if IS_TILED:
        # A part is at most a page long, so a row of it lies in one page or two. Their ids are read
        # here, once: the loads inside the loop then depend on nothing that is still in flight.
        last_page = (start + k_len - 1) // PAGE_ELEMS
        page_a = tl.load(pages + first_page, mask=rank_mask, other=0)
        page_b = tl.load(pages + last_page, mask=rank_mask, other=0)
    acc = tl.zeros((ROWS, RANK_TILE), tl.float32)
    for k in tl.range(0, k_len, BLOCK_K):
        x_mask = row_mask[:, None]
        a_mask = rank_mask[:, None]
        if K % BLOCK_K != 0:
            in_row = (k0 + k + cols < K)[None, :]
            x_mask = x_mask & in_row
            a_mask = a_mask & in_row
        x = tl.load(x_at[:, None] + (k0 + k + cols)[None, :], mask=x_mask, other=0.0)
        if IS_TILED:
            e = tl.multiple_of(start + k, [BLOCK_K])
            page = tl.where(e // PAGE_ELEMS == first_page, page_a, page_b)
            at = tl.multiple_of(page.to(tl.int64) * PAGE_ELEMS + e % PAGE_ELEMS, [BLOCK_K])
            a = tl.load(pool_ptr + at[:, None] + cols[None, :], mask=a_mask, other=0.0)
        else:
            e = (start + k)[:, None] + cols[None, :]
            a = load_elements(pool_ptr, pages, e, a_mask, PAGE_ELEMS)
        acc = dot(x, tl.trans(a), acc)
    return acc


@triton.jit(do_not_specialize=["span"])
def shrink_kernel(
    planes_ptr,
    x_ptr,
    pool_ptr,
    rows_ptr,
    pages_ptr,
    items_ptr,
    spans_ptr,
    x_stride,
    span,
    K: tl.constexpr,
    PITCH: tl.constexpr,
    PART: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK_TILE: tl.constexpr,
    IS_SERIAL: tl.constexpr,
    IS_TILED: tl.constexpr,
):
    """`planes[p, t, r] = sum of A_g[r, k] x[t, k] over k in part p`, in float32.

    A unit of work is one K part of an item: up to 64 rows of one adapter x up to `RANK_TILE` rank
    rows of its A matrices, which share rows of `K` elements. With `IS_SERIAL` the program adds the
    parts itself, in the order in which the expand kernel would, and writes one plane.

    Args:
        planes_ptr: float32; where an item's block `[part, row, pitch]` begins is in the item.
        x_ptr: `[T, K]`, rows `x_stride` elements apart.
        pool_ptr: `[P, PAGE_ELEMS]`, one layer of the pool.
        rows_ptr, pages_ptr, items_ptr, spans_ptr: int32, see `lora_work.LoRAWork`.
        span: which `[4, 2]` of the spans this launch follows.
    """
    first = tl.load(spans_ptr + span * SPAN)
    count = tl.load(spans_ptr + span * SPAN + 1)
    UNITS: tl.constexpr = 1 if IS_SERIAL else NUM_PARTS
    PARTS_OF_UNIT: tl.constexpr = NUM_PARTS if IS_SERIAL else 1
    t = tl.arange(0, ROWS)
    r = tl.arange(0, RANK_TILE)
    for unit in tl.range(tl.program_id(0), count * UNITS, tl.num_programs(0)):
        row_start, row_count, pages_start, weight_start, num_ranks, plane_start, pitch, _ = (
            load_item(items_ptr, first + unit // UNITS)
        )
        pages = pages_ptr + pages_start
        rank_mask = r < num_ranks
        part = unit % UNITS
        for tile in tl.range(0, row_count, ROWS):
            row_mask = tile + t < row_count
            row = tl.load(rows_ptr + row_start + tile + t, mask=row_mask, other=0)
            x_at = x_ptr + row.to(tl.int64) * x_stride
            total = tl.zeros((ROWS, RANK_TILE), tl.float32)
            for p in tl.range(part, part + PARTS_OF_UNIT):
                total += _multiply_part(
                    x_at,
                    pool_ptr,
                    pages,
                    weight_start,
                    row_mask,
                    rank_mask,
                    p,
                    K,
                    PITCH,
                    PART,
                    PAGE_ELEMS,
                    BLOCK_K,
                    RANK_TILE,
                    IS_TILED,
                )
            at = plane_start + (part * row_count + tile + t) * pitch
            mask = row_mask[:, None] & rank_mask[None, :]
            tl.store(planes_ptr + at[:, None] + r[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["span"])
def gather_kernel(
    planes_ptr,
    token_ids_ptr,
    pool_ptr,
    rows_ptr,
    pages_ptr,
    items_ptr,
    spans_ptr,
    span,
    PAGE_ELEMS: tl.constexpr,
    RANK_TILE: tl.constexpr,
):
    """`planes[0, t, r] = A_g^T[token_id(t), r]`: the shrink of an embedding.

    `A^T` is `[V, R]` without gaps, so a token's row may cross a page border. Other arguments as in
    `shrink_kernel`; `token_ids_ptr` is integers `[T]`.
    """
    first = tl.load(spans_ptr + span * SPAN)
    count = tl.load(spans_ptr + span * SPAN + 1)
    t = tl.arange(0, ROWS)
    r = tl.arange(0, RANK_TILE)
    for unit in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        row_start, row_count, pages_start, weight_start, num_ranks, plane_start, pitch, run_rank = (
            load_item(items_ptr, first + unit)
        )
        pages = pages_ptr + pages_start
        rank_mask = r < num_ranks
        for tile in tl.range(0, row_count, ROWS):
            row_mask = tile + t < row_count
            row = tl.load(rows_ptr + row_start + tile + t, mask=row_mask, other=0)
            token = tl.load(token_ids_ptr + row, mask=row_mask, other=0).to(tl.int32)
            e = (weight_start + token * run_rank)[:, None] + r[None, :]
            mask = row_mask[:, None] & rank_mask[None, :]
            v = load_elements(pool_ptr, pages, e, mask, PAGE_ELEMS)
            at = plane_start + (tile + t) * pitch
            tl.store(planes_ptr + at[:, None] + r[None, :], v.to(tl.float32), mask=mask)


def aot_cases(model: ModelShape) -> list[AotCase]:
    """Return what serving a model launches."""
    sizes = model.chunk_elems, model.page_elems
    embedding = LoRAShape(0, (0,), 0, (model.hidden_size,), *sizes, True)
    constants = embedding.gather_constants(is_serial=False)
    cases = [lora_case("lora gather embedding", gather_kernel, constants, {}, weights=None)]
    for name, shape, is_serial in site_variants(model):
        constants = shape.shrink_constants(is_serial=is_serial)
        cases.append(
            lora_case(f"lora shrink {name}", shrink_kernel, constants, shape.shrink_options)
        )
    return cases
