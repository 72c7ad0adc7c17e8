"""Laying an adapter's matrices out as pages, in host memory.

Packing runs beside the steps and its Python code holds up theirs, so it makes few calls: matrices
of consecutive layers that are alike and lie at equal distances in memory, as they do in an adapter
file, are packed by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple, Self

import torch

from loraplex_memory.adapter_file import AdapterWeights, LoRAPair, ranks_of
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PROJECTIONS
from loraplex_memory.scratch import Scratch

#: Most elements packed by one call: what it computes on the way stays in the cache.
_RUN_ELEMS: Final = 1 << 18


def pack_adapter(
    weights: AdapterWeights,
    layout: AdapterLayout,
    *,
    dtype: torch.dtype,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Return the adapter as pages `[L, layout.num_pages, page_elems]` of `dtype`.

    The scale is folded into B in float32 before the one rounding to `dtype`.

    Args:
        weights: the adapter's matrices.
        layout: where each of them goes.
        dtype: the pool's.
        scratch: memory to pack into: the pages are gone when it is used again.

    Raises:
        ValueError: a matrix is not of the shape that `layout` has room for, or the modules are not
            the layout's: one that is missing would be served as the base.
    """
    _check(weights, layout)
    pool = layout.pool
    num_layers, chunk_elems = pool.geometry.num_layers, pool.chunk_elems
    shape = (num_layers, layout.num_pages, pool.page_elems)
    packed = (scratch or Scratch()).take(shape, dtype)
    rows = packed.view(num_layers, -1)
    for at, projection in enumerate(PROJECTIONS):
        pairs = {
            layer: weights[layer, projection]
            for layer in range(num_layers)
            if layout.ranks[layer][at]
        }
        places = {
            layer: _Place.of(pair, layout.a_chunks[layer][at], layout.b_chunks[layer][at])
            for layer, pair in pairs.items()
        }
        row_elems = max(
            pool.geometry.in_features(projection), pool.geometry.out_features(projection)
        )
        for run in _runs(places, _RUN_ELEMS // row_elems):
            a = _stack([pairs[layer].a for layer in run])
            b = _stack([pairs[layer].b for layer in run]).float()
            scales = torch.tensor([pairs[layer].scale for layer in run]).view(-1, 1, 1)
            into = rows[run.start : run.stop]
            _put(into, layout.a_chunks[run.start][at] * chunk_elems, a)
            _put(into, layout.b_chunks[run.start][at] * chunk_elems, (b * scales).transpose(1, 2))
    _clear_ends(rows, layout)
    return packed


def _check(weights: AdapterWeights, layout: AdapterLayout) -> None:
    geometry = layout.pool.geometry
    is_beyond = any(not 0 <= layer < geometry.num_layers for layer, _ in weights)
    if is_beyond or ranks_of(weights, geometry.num_layers) != layout.ranks:
        raise ValueError("the modules and their ranks are not those that the layout has room for")
    sizes = {p: (geometry.in_features(p), geometry.out_features(p)) for p in PROJECTIONS}
    for (layer, projection), pair in weights.items():
        rank, (in_features, out_features) = pair.rank, sizes[projection]
        if pair.a.shape != (rank, in_features) or pair.b.shape != (out_features, rank):
            raise ValueError(
                f"layer {layer} {projection}: A {tuple(pair.a.shape)}, B {tuple(pair.b.shape)}; "
                f"expected {(rank, in_features)} and {(out_features, rank)}"
            )


class _Place(NamedTuple):
    """Where one module's matrices are; a run's have all but the starts in common."""

    alike: tuple[object, ...]
    a_start: int
    b_start: int

    @classmethod
    def of(cls, pair: LoRAPair, a_chunk: int, b_chunk: int) -> Self:
        alike = (a_chunk, b_chunk, *_kind(pair.a), *_kind(pair.b))
        return cls(alike, int(pair.a.storage_offset()), int(pair.b.storage_offset()))


def _kind(matrix: torch.Tensor) -> tuple[object, ...]:
    memory = matrix.untyped_storage().data_ptr()
    return matrix.dtype, matrix.shape, matrix.stride(), memory


def _runs(places: Mapping[int, _Place], max_layers: int) -> Iterator[range]:
    """Yield consecutive layers that one call can pack; together, all that have the module."""
    run = range(0)
    for layer, here in sorted(places.items()):
        if run and layer == run.stop and len(run) < max_layers:
            before = [places[i] for i in run[-2:]]
            if _is_evenly_spaced([*before, here]):
                run = range(run.start, layer + 1)
                continue
        if run:
            yield run
        run = range(layer, layer + 1)
    if run:
        yield run


def _is_evenly_spaced(places: Sequence[_Place]) -> bool:
    steps = {(b.a_start - a.a_start, b.b_start - a.b_start) for a, b in pairwise(places)}
    is_alike = all(place.alike == places[0].alike for place in places)
    return is_alike and len(steps) == 1 and min(steps.pop()) > 0


def _stack(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the matrices of a run as one view `[n, rows, columns]`."""
    first = matrices[0]
    if len(matrices) == 1:
        return first.unsqueeze(0)
    step = matrices[1].storage_offset() - first.storage_offset()
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


def _put(rows: torch.Tensor, start: int, matrices: torch.Tensor) -> None:
    """Copy `[n, rank, length]` into `rows` `[n, elements of a layer]`, each from `start` on."""
    num_elems = matrices.shape[1] * matrices.shape[2]
    rows[:, start : start + num_elems].view(matrices.shape).copy_(matrices)


def _clear_ends(rows: torch.Tensor, layout: AdapterLayout) -> None:
    """Fill what no matrix covers with zeros: whatever was there may not reach the pool."""
    pool, down = layout.pool, PROJECTIONS.index("down")
    row_chunks = pool.geometry.out_features("down") // pool.chunk_elems
    ends = [
        (b_chunks[down] + ranks[down] * row_chunks) * pool.chunk_elems
        for b_chunks, ranks in zip(layout.b_chunks, layout.ranks, strict=True)
    ]
    if min(ends) == max(ends):
        rows[:, ends[0] :].zero_()
        return
    for row, end in zip(rows, ends, strict=True):
        row[end:].zero_()
