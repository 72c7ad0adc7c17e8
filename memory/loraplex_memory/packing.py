"""Laying an adapter's matrices out as pages, in host memory."""

from __future__ import annotations

import torch

from loraplex_memory.adapter_file import AdapterWeights, ranks_of
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PROJECTIONS


def pack_adapter(
    weights: AdapterWeights,
    layout: AdapterLayout,
    *,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the adapter as pages `[L, layout.num_pages, page_elems]` of `dtype`.

    The scale is folded into B in float32 before the one rounding to `dtype`.

    Args:
        weights: the adapter's matrices.
        layout: where each of them goes.
        dtype: the pool's.
        out: memory to pack into, of that shape and dtype; whatever is in it is overwritten.

    Raises:
        ValueError: a matrix is not of the shape that `layout` has room for, or the modules are not
            the layout's: one that is missing would be served as the base.
    """
    pool = layout.pool
    num_layers = pool.geometry.num_layers
    is_beyond = any(not 0 <= layer < num_layers for layer, _ in weights)
    if is_beyond or ranks_of(weights, num_layers) != layout.ranks:
        raise ValueError("the modules and their ranks are not those that the layout has room for")
    shape = (num_layers, layout.num_pages, pool.page_elems)
    packed = torch.zeros(shape, dtype=dtype) if out is None else out.zero_()
    assert (packed.shape, packed.dtype) == (shape, dtype)
    rows_of = packed.view(num_layers, -1)
    for (layer, projection), pair in weights.items():
        at = PROJECTIONS.index(projection)
        rank = layout.ranks[layer][at]
        expect_a = (rank, pool.geometry.in_features(projection))
        expect_b = (pool.geometry.out_features(projection), rank)
        if tuple(pair.a.shape) != expect_a or tuple(pair.b.shape) != expect_b:
            raise ValueError(
                f"layer {layer} {projection}: A {tuple(pair.a.shape)}, B {tuple(pair.b.shape)}; "
                f"expected {expect_a} and {expect_b}"
            )
        rows = rows_of[layer]
        _put(rows, layout.a_chunks[layer][at] * pool.chunk_elems, pair.a)
        _put(rows, layout.b_chunks[layer][at] * pool.chunk_elems, (pair.b.float() * pair.scale).T)
    return packed


def _put(row: torch.Tensor, start: int, matrix: torch.Tensor) -> None:
    row[start : start + matrix.numel()].view(matrix.shape).copy_(matrix)
