"""Laying an adapter's matrices out as pages, in host memory.

Packing runs beside the steps and its Python code holds up theirs, so it makes few calls: matrices
that are alike and lie at equal distances in memory, as all layers do in an adapter file, are packed
by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS
from loraplex_memory.part_packing import pack_parts
from loraplex_memory.runs import runs
from loraplex_memory.scratch import Scratch
from loraplex_memory.sharding import own_part

#: Most elements packed by one call: what it computes on the way stays in the cache.
_RUN_ELEMS: Final = 1 << 18


def pack_adapter(
    weights: AdapterWeights,
    layout: AdapterLayout,
    *,
    dtype: torch.dtype,
    scratch: Scratch | None = None,
    rank: int = 0,
) -> torch.Tensor:
    """Return the adapter as pages `[L, layout.num_pages, page_elems]` of `dtype`.

    The scale is folded into B in float32 before the one rounding to `dtype`. Where the model is cut
    over devices, these are the pages of one of them.

    Args:
        weights: the adapter's matrices.
        layout: where each of them goes.
        dtype: the pool's.
        scratch: memory to pack into: the pages are gone when it is used again.
        rank: whose part of the adapter it is.

    Raises:
        ValueError: a matrix is not of the shape that `layout` has room for, or the modules are not
            the layout's: one that is missing would be served as the base.
    """
    check_weights(weights, layout)
    weights = own_part(weights, layout.pool.partition, rank)
    pool = layout.pool
    num_layers = pool.geometry.num_layers
    shape = (num_layers, layout.num_pages, pool.page_elems)
    packed = (scratch or Scratch()).take(shape, dtype)
    rows = packed.view(num_layers, -1)
    for at, projection in enumerate(PROJECTIONS):
        present = [layer for layer in range(num_layers) if layout.ranks[layer][at]]
        pairs = {layer: weights.lora[layer, projection] for layer in present}
        for group in _groups(pairs, layout, at):
            some = [pairs[layer] for layer in group]
            # float32, and so is every product with it.
            scales = torch.tensor([pair.scale for pair in some]).view(-1, 1, 1)
            b = (_stack([pair.b for pair in some]) * scales).to(dtype).transpose(1, 2)
            a_start = layout.a_chunks[group[0]][at] * pool.chunk_elems
            b_start = layout.b_chunks[group[0]][at] * pool.chunk_elems
            _put(rows, group, a_start, _stack([pair.a for pair in some]))
            _put(rows, group, b_start, b)
    _clear_ends(rows, layout)
    pack_parts(packed, weights.parts, layout)
    return packed


def check_weights(weights: AdapterWeights, layout: AdapterLayout) -> None:
    """Raise ValueError if these are not the matrices that the layout has room for."""
    geometry = layout.pool.geometry
    is_beyond = any(not 0 <= layer < geometry.num_layers for layer, _ in weights.lora)
    if is_beyond or weights.spec(geometry.num_layers) != layout.spec:
        raise ValueError("the modules and their ranks are not those that the layout has room for")
    sizes = {p: (geometry.in_features(p), geometry.out_features(p)) for p in PROJECTIONS}
    for (layer, projection), pair in weights.lora.items():
        rank, (in_features, out_features) = pair.rank, sizes[projection]
        if pair.a.shape != (rank, in_features) or pair.b.shape != (out_features, rank):
            raise ValueError(
                f"layer {layer} {projection}: A {tuple(pair.a.shape)}, B {tuple(pair.b.shape)}; "
                f"expected {(rank, in_features)} and {(out_features, rank)}"
            )


def _groups(pairs: Mapping[int, LoRAPair], layout: AdapterLayout, at: int) -> Iterator[list[int]]:
    """Yield layers that one call can pack; together, all that have the module.

    Args:
        pairs: the matrices of one projection, by layer.
        layout: where they go.
        at: the projection's index.
    """
    alike: dict[tuple[object, ...], list[tuple[int, int, int]]] = {}
    for layer, pair in pairs.items():
        place = layout.ranks[layer][at], layout.a_chunks[layer][at], layout.b_chunks[layer][at]
        addresses = pair.a.data_ptr(), pair.b.data_ptr(), layer
        alike.setdefault((*place, *_kind(pair.a), *_kind(pair.b)), []).append(addresses)
    for places in alike.values():
        first = pairs[places[0][-1]]
        yield from _evenly_spaced(
            sorted(places), _RUN_ELEMS // max(first.a.numel(), first.b.numel())
        )


def _kind(matrix: torch.Tensor) -> tuple[object, ...]:
    return matrix.dtype, matrix.stride(), matrix.untyped_storage().data_ptr()


def _evenly_spaced(places: list[tuple[int, int, int]], max_len: int) -> Iterator[list[int]]:
    """Cut (address of A, address of B, layer), in order, where a step differs from the last."""
    group: list[int] = []
    step = last = (0, 0)
    for a, b, layer in places:
        new_step = a - last[0], b - last[1]
        fits = new_step[1] > 0 and (len(group) == 1 or new_step == step)
        if group and (len(group) >= max_len or not fits):
            yield group
            group = []
        group.append(layer)
        step, last = new_step, (a, b)
    if group:
        yield group


def _stack(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the matrices of a group as one view `[n, rows, columns]`."""
    first = matrices[0]
    if len(matrices) == 1:
        return first.unsqueeze(0)
    step = (matrices[1].data_ptr() - first.data_ptr()) // first.itemsize
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


def _put(rows: torch.Tensor, layers: list[int], start: int, matrices: torch.Tensor) -> None:
    """Copy `[n, rank, length]` to `rows[layer, start:]` of each layer.

    Runs of layers, as an index would make it a copy of element by element.
    """
    num_elems = matrices.shape[1] * matrices.shape[2]
    for run in runs(layers):
        piece = matrices[run]
        first = layers[run.start]
        into = rows[first : first + len(piece), start : start + num_elems]
        into.view(piece.shape).copy_(piece)


def layer_ends(layout: AdapterLayout) -> list[int]:
    """Return how many elements of each layer's pages the matrices cover."""
    pool, down = layout.pool, PROJECTIONS.index("down")
    row_chunks = pool.b_width("down") // pool.chunk_elems
    return [
        (b_chunks[down] + ranks[down] * row_chunks) * pool.chunk_elems
        for b_chunks, ranks in zip(layout.b_chunks, layout.ranks, strict=True)
    ]


def _clear_ends(rows: torch.Tensor, layout: AdapterLayout) -> None:
    """Fill what no matrix covers with zeros: whatever was there may not reach the pool."""
    ends = layer_ends(layout)
    if min(ends) == max(ends):
        rows[:, ends[0] :].zero_()
        return
    for row, end in zip(rows, ends, strict=True):
        row[end:].zero_()
