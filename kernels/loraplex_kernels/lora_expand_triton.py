"""The second half of LoRA over paged weights of ragged ranks, driven by the list of the first.

    y[t] = scale_g * (y[t] + w_g sum_r round(sum_p planes[p, t, r]) B_g[r]) + bias_g

What `lora_shrink_triton` says of the list, of weights and of company holds here as well: parts are
added in order of position, and no sum is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_kernels.aot import AotCase, ModelShape
from loraplex_kernels.arithmetic import dot, narrow
from loraplex_kernels.lora_cases import lora_case, site_variants
from loraplex_kernels.lora_elements import ITEM, ROWS, SPAN, load_elements, load_item


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
    bounds = spans_ptr + span * SPAN
    end_0 = tl.load(bounds + 3) * BLOCKS_0
    end_1 = end_0 + tl.load(bounds + 5) * BLOCKS_1
    end_2 = end_1 + tl.load(bounds + 7) * BLOCKS_2
    t = tl.arange(0, ROWS)
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
        row_start, row_count, pages_start, weight_start, rank, plane_start, pitch, epilogue = (
            load_item(items_ptr, index)
        )
        pages = pages_ptr + pages_start
        weight_start += block * BLOCK_N
        cols = block * BLOCK_N + n
        for tile in tl.range(0, row_count, ROWS):
            row_mask = tile + t < row_count
            row = tl.load(rows_ptr + row_start + tile + t, mask=row_mask, other=0)
            y_at = y_ptr + row.to(tl.int64)[:, None] * y_stride + (column + cols)[None, :]
            y_mask = row_mask[:, None]
            b_in_row = (n >= 0)[None, :]
            if not IS_EVEN:
                y_mask = y_mask & (cols < width)[None, :]
                # Rows are padded to whole chunks: rounding up to 16 bytes stays inside the row.
                b_in_row = (cols < (width + 7) // 8 * 8 if IS_TILED else cols < width)[None, :]
            acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
            for r0 in tl.range(0, rank, ROWS):
                r = r0 + t
                rank_mask = r < rank
                v_mask = row_mask[:, None] & rank_mask[None, :]
                v_at = planes_ptr + plane_start + (tile + t)[:, None] * pitch + r[None, :]
                v = tl.zeros((ROWS, ROWS), tl.float32)
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
                    b = load_elements(pool_ptr, pages, e, b_mask, PAGE_ELEMS)
                acc = dot(narrow(v, b.dtype), b, acc)
            if IS_WEIGHTED:  # noqa: SIM102  decided when compiling, and then at run time
                if epilogue >= 0:
                    acc *= tl.load(items_ptr + epilogue * ITEM + 2).to(tl.float32, bitcast=True)
            # Read only here: held across the products, y would cost a third of the occupancy.
            y = tl.load(y_at, mask=y_mask, other=0.0).to(tl.float32) + acc
            if epilogue >= 0:
                inside = cols < width
                scale_start = tl.load(items_ptr + epilogue * ITEM)
                if scale_start >= 0:
                    e = scale_start + cols
                    scale = load_elements(vectors_ptr, pages, e, inside, PAGE_ELEMS).to(tl.float32)
                    e += weight_pitch  # what rounding left over of the scale is the next row
                    rest = load_elements(vectors_ptr, pages, e, inside, PAGE_ELEMS)
                    y *= (scale + rest.to(tl.float32))[None, :]
                bias_start = tl.load(items_ptr + epilogue * ITEM + 1)
                if bias_start >= 0:
                    e = bias_start + cols
                    bias = load_elements(vectors_ptr, pages, e, inside, PAGE_ELEMS)
                    y += bias.to(tl.float32)[None, :]
            tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=y_mask)


def aot_cases(model: ModelShape) -> list[AotCase]:
    """Return what serving a model launches: for plain steps, and for weighted ones."""
    cases = []
    for name, shape, is_serial in site_variants(model):
        for is_weighted in (False, True):
            weighted = "weighted " if is_weighted else ""
            constants = shape.expand_constants(is_serial=is_serial, is_weighted=is_weighted)
            options = shape.weighted_options if is_weighted else shape.expand_options
            cases.append(
                lora_case(f"lora expand {weighted}{name}", expand_kernel, constants, options)
            )
    return cases
