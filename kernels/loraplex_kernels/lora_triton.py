"""Shrink and expand over paged weights of ragged ranks (SGMV), driven by a flat work list.

    planes[p, t, r] = sum of A_g[r, k] x[t, k] over k in part p
    y[t] = scale_g * (y[t] + w_g sum_r round(sum_p planes[p, t, r]) B_g[r]) + bias_g

Every program strides the list that `lora_work` builds, whose bounds are in device memory: one
captured graph serves any adapters at any mix of ranks. Weights are read through page ids, at their
true rank. Nothing depends on company: K is cut by shape, parts are added in order of position,
every product is the same tensor-core instruction on a tile of 16 rows, and no sum is atomic.

Element `e` of an adapter's slice of a layer lies in page `pages[e // PAGE_ELEMS]` at offset
`e % PAGE_ELEMS`. A tile takes power-of-two runs, aligned to their own length, of whole rows: none
crosses a page border, so a row of a tile needs one page id and loads 16 bytes at a time. (Where
that power of two is below 16, which only tests have, the page of each element is looked up.)
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from loraplex_kernels.aot import AotCase, ModelShape
from loraplex_kernels.arithmetic import dot, narrow
from loraplex_kernels.elementwise_triton import aligned
from loraplex_kernels.lora_shape import ROW_TILE, LoRAShape
from loraplex_kernels.lora_work import ITEM_FIELDS, NUM_LAUNCHES

_M = tl.constexpr(ROW_TILE)
_ITEM = tl.constexpr(ITEM_FIELDS)
_SPAN = tl.constexpr(2 * NUM_LAUNCHES)


@triton.jit
def _load_elements(pool_ptr, pages, e, mask, PAGE_ELEMS: tl.constexpr):
    """Elements `e` of a slice, each through its own page id; 0 where `mask` is false."""
    page = tl.load(pages + e // PAGE_ELEMS, mask=mask, other=0).to(tl.int64)
    return tl.load(pool_ptr + page * PAGE_ELEMS + e % PAGE_ELEMS, mask=mask, other=0.0)


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
    acc = tl.zeros((_M, RANK_TILE), tl.float32)
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
            a = _load_elements(pool_ptr, pages, e, a_mask, PAGE_ELEMS)
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
    first = tl.load(spans_ptr + span * _SPAN)
    count = tl.load(spans_ptr + span * _SPAN + 1)
    UNITS: tl.constexpr = 1 if IS_SERIAL else NUM_PARTS
    PARTS_OF_UNIT: tl.constexpr = NUM_PARTS if IS_SERIAL else 1
    t = tl.arange(0, _M)
    r = tl.arange(0, RANK_TILE)
    for unit in tl.range(tl.program_id(0), count * UNITS, tl.num_programs(0)):
        item = items_ptr + (first + unit // UNITS) * _ITEM
        row_start = tl.load(item)
        row_count = tl.load(item + 1)
        pages = pages_ptr + tl.load(item + 2)
        weight_start = tl.load(item + 3)
        rank_mask = r < tl.load(item + 4)
        plane_start = tl.load(item + 5)
        pitch = tl.load(item + 6)
        part = unit % UNITS
        for tile in tl.range(0, row_count, _M):
            row_mask = tile + t < row_count
            row = tl.load(rows_ptr + row_start + tile + t, mask=row_mask, other=0)
            x_at = x_ptr + row.to(tl.int64) * x_stride
            total = tl.zeros((_M, RANK_TILE), tl.float32)
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
    first = tl.load(spans_ptr + span * _SPAN)
    count = tl.load(spans_ptr + span * _SPAN + 1)
    t = tl.arange(0, _M)
    r = tl.arange(0, RANK_TILE)
    for unit in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        item = items_ptr + (first + unit) * _ITEM
        row_start = tl.load(item)
        row_count = tl.load(item + 1)
        pages = pages_ptr + tl.load(item + 2)
        weight_start = tl.load(item + 3)
        rank_mask = r < tl.load(item + 4)
        plane_start = tl.load(item + 5)
        pitch = tl.load(item + 6)
        run_rank = tl.load(item + 7)
        for tile in tl.range(0, row_count, _M):
            row_mask = tile + t < row_count
            row = tl.load(rows_ptr + row_start + tile + t, mask=row_mask, other=0)
            token = tl.load(token_ids_ptr + row, mask=row_mask, other=0).to(tl.int32)
            e = (weight_start + token * run_rank)[:, None] + r[None, :]
            mask = row_mask[:, None] & rank_mask[None, :]
            v = _load_elements(pool_ptr, pages, e, mask, PAGE_ELEMS)
            at = plane_start + (tile + t) * pitch
            tl.store(planes_ptr + at[:, None] + r[None, :], v.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["span"])
def expand_kernel(
    y_ptr,
    planes_ptr,
    pool_ptr,
    vectors_ptr,
    rows_ptr,
    pages_ptr,
    items_ptr,
    spans_ptr,
    y_stride,
    span,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_TILED: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
):
    """`y[t] = scale_g * (y[t] + w_g sum_r round(sum_p planes[p, t, r]) B_g[r]) + bias_g`, in place.

    A unit of work is one column block of an item: up to 64 rows of one adapter x one module.
    The sum over parts is rounded to the dtype of the weights, as the tensor cores take it; all else
    is float32 until the one rounding into `y`.

    Args:
        y_ptr: `[T, WIDTH_0 + WIDTH_1 + WIDTH_2]`, rows `y_stride` elements apart.
        vectors_ptr: the pool again, for scales and biases, which are no tiles and read slower.
        WIDTH_0, WIDTH_1, WIDTH_2: output width of each module of the site; 0 for none.
        CHUNK: rows of B are this many elements, or a multiple, apart.
        NUM_PLANES: parts that the shrink kernel wrote.
        IS_WEIGHTED: some segment has a weight that is not 1. Plain steps need no registers for it.
    """
    BLOCKS_0: tl.constexpr = (WIDTH_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (WIDTH_1 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_2: tl.constexpr = (WIDTH_2 + BLOCK_N - 1) // BLOCK_N
    PITCH_0: tl.constexpr = (WIDTH_0 + CHUNK - 1) // CHUNK * CHUNK
    PITCH_1: tl.constexpr = (WIDTH_1 + CHUNK - 1) // CHUNK * CHUNK
    PITCH_2: tl.constexpr = (WIDTH_2 + CHUNK - 1) // CHUNK * CHUNK
    IS_EVEN: tl.constexpr = (WIDTH_0 % BLOCK_N + WIDTH_1 % BLOCK_N + WIDTH_2 % BLOCK_N) == 0
    bounds = spans_ptr + span * _SPAN
    end_0 = tl.load(bounds + 3) * BLOCKS_0
    end_1 = end_0 + tl.load(bounds + 5) * BLOCKS_1
    end_2 = end_1 + tl.load(bounds + 7) * BLOCKS_2
    t = tl.arange(0, _M)
    n = tl.arange(0, BLOCK_N)
    for unit in tl.range(tl.program_id(0), end_2, tl.num_programs(0)):
        index = tl.load(bounds + 2) + unit // BLOCKS_0
        block = unit % BLOCKS_0
        column = 0
        width = WIDTH_0
        weight_pitch = PITCH_0
        if WIDTH_1 > 0:  # noqa: SIM102  decided when compiling, and then at run time
            if unit >= end_0:
                index = tl.load(bounds + 4) + (unit - end_0) // BLOCKS_1
                block = (unit - end_0) % BLOCKS_1
                column = WIDTH_0
                width = WIDTH_1
                weight_pitch = PITCH_1
        if WIDTH_2 > 0:  # noqa: SIM102
            if unit >= end_1:
                index = tl.load(bounds + 6) + (unit - end_1) // BLOCKS_2
                block = (unit - end_1) % BLOCKS_2
                column = WIDTH_0 + WIDTH_1
                width = WIDTH_2
                weight_pitch = PITCH_2
        item = items_ptr + index * _ITEM
        row_start = tl.load(item)
        row_count = tl.load(item + 1)
        pages = pages_ptr + tl.load(item + 2)
        weight_start = tl.load(item + 3) + block * BLOCK_N
        rank = tl.load(item + 4)
        plane_start = tl.load(item + 5)
        pitch = tl.load(item + 6)
        epilogue = tl.load(item + 7)
        cols = block * BLOCK_N + n
        for tile in tl.range(0, row_count, _M):
            row_mask = tile + t < row_count
            row = tl.load(rows_ptr + row_start + tile + t, mask=row_mask, other=0)
            y_at = y_ptr + row.to(tl.int64)[:, None] * y_stride + (column + cols)[None, :]
            y_mask = row_mask[:, None]
            b_in_row = (n >= 0)[None, :]
            if not IS_EVEN:
                y_mask = y_mask & (cols < width)[None, :]
                # Rows are padded to whole chunks: rounding up to 16 bytes stays inside the row.
                b_in_row = (cols < (width + 7) // 8 * 8 if IS_TILED else cols < width)[None, :]
            acc = tl.zeros((_M, BLOCK_N), tl.float32)
            for r0 in tl.range(0, rank, _M):
                r = r0 + t
                rank_mask = r < rank
                v_mask = row_mask[:, None] & rank_mask[None, :]
                v_at = planes_ptr + plane_start + (tile + t)[:, None] * pitch + r[None, :]
                v = tl.zeros((_M, _M), tl.float32)
                for p in tl.static_range(NUM_PLANES):
                    v += tl.load(v_at + p * (row_count * pitch), mask=v_mask, other=0.0)
                start = weight_start + r * weight_pitch
                b_mask = rank_mask[:, None] & b_in_row
                if IS_TILED:
                    page = tl.load(pages + start // PAGE_ELEMS, mask=rank_mask, other=0)
                    at = page.to(tl.int64) * PAGE_ELEMS + start % PAGE_ELEMS
                    at = tl.multiple_of(at, [BLOCK_N])
                    b = tl.load(pool_ptr + at[:, None] + n[None, :], mask=b_mask, other=0.0)
                else:
                    e = start[:, None] + n[None, :]
                    b = _load_elements(pool_ptr, pages, e, b_mask, PAGE_ELEMS)
                acc = dot(narrow(v, b.dtype), b, acc)
            if IS_WEIGHTED:  # noqa: SIM102  decided when compiling, and then at run time
                if epilogue >= 0:
                    acc *= tl.load(items_ptr + epilogue * _ITEM + 2).to(tl.float32, bitcast=True)
            # Read only here: held across the products, y would cost a third of the occupancy.
            y = tl.load(y_at, mask=y_mask, other=0.0).to(tl.float32) + acc
            if epilogue >= 0:
                inside = cols < width
                scale_start = tl.load(items_ptr + epilogue * _ITEM)
                if scale_start >= 0:
                    e = scale_start + cols
                    scale = _load_elements(vectors_ptr, pages, e, inside, PAGE_ELEMS).to(tl.float32)
                    e += weight_pitch  # what rounding left over of the scale is the next row
                    rest = _load_elements(vectors_ptr, pages, e, inside, PAGE_ELEMS)
                    y *= (scale + rest.to(tl.float32))[None, :]
                bias_start = tl.load(items_ptr + epilogue * _ITEM + 1)
                if bias_start >= 0:
                    e = bias_start + cols
                    bias = _load_elements(vectors_ptr, pages, e, inside, PAGE_ELEMS)
                    y += bias.to(tl.float32)[None, :]
            tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=y_mask)


def aot_cases(model: ModelShape) -> list[AotCase]:
    """Return what serving a model launches: sites with K split and, for large steps, serial.

    The output head computes a row per sequence, and so is never serial.
    """
    chunk_elems, page_elems = model.chunk_elems, model.page_elems
    embedding = LoRAShape(0, (0,), 0, (model.hidden_size,), chunk_elems, page_elems, True)
    constants = embedding.gather_constants(is_serial=False)
    cases = [_case("lora gather embedding", gather_kernel, constants, {})]
    head = (model.hidden_size, (model.vocab_size,))
    for name, (in_features, widths) in {**model.sites, "lm_head": head}.items():
        modules = tuple(range(len(widths)))
        shape = LoRAShape(0, modules, in_features, widths, chunk_elems, page_elems)
        for is_serial in (False, True) if name != "lm_head" else (False,):
            variant = f"{name}, {'serial' if is_serial else 'split'}"
            constants = shape.shrink_constants(is_serial=is_serial)
            cases.append(
                _case(f"lora shrink {variant}", shrink_kernel, constants, shape.shrink_options)
            )
            constants = shape.expand_constants(is_serial=is_serial)
            cases.append(
                _case(f"lora expand {variant}", expand_kernel, constants, shape.expand_options)
            )
            constants = shape.expand_constants(is_serial=is_serial, is_weighted=True)
            name_of_weighted = f"lora expand weighted {variant}"
            cases.append(_case(name_of_weighted, expand_kernel, constants, shape.weighted_options))
    return cases


#: Run-time arguments that are not int32 tables.
_TYPES = {
    "x_ptr": "*bf16",
    "y_ptr": "*bf16",
    "pool_ptr": "*bf16",
    "vectors_ptr": "*bf16",
    "planes_ptr": "*fp32",
    "token_ids_ptr": "*i64",
    "x_stride": "i32",
    "y_stride": "i32",
    "span": "i32",
}


def _case(name: str, fn: Any, constants: dict[str, int], options: dict[str, int]) -> AotCase:
    signature = {arg: _TYPES.get(arg, "*i32") for arg in fn.arg_names if arg not in constants}
    own = ("num_warps", "num_stages")
    return AotCase(
        name,
        fn,
        signature,
        constants,
        attrs=aligned(fn, signature),
        must_vectorise=() if fn is gather_kernel else ("pool_ptr",),
        options={key: value for key, value in options.items() if key not in own},
        **{key: value for key, value in options.items() if key in own},
    )
