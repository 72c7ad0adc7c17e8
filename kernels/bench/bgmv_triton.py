"""Per-token BGMV over the paged pool: S-LoRA's decode algorithm (arXiv 2311.03285, section 5.3).

Shrink: one program per (rank row, token). Expand: one program per (output tile, token). Pages and
true ranks are ours, so it moves no padding; but every token reads its adapter's weights again, and
each projection is a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from baseline_site import Site

#: Weights a program holds in flight: 2048 elements, 16 per thread of four warps.
_TILE_ELEMS = 2048
_RANK_TILE = 16


@triton.jit
def _shrink_kernel(
    hidden,
    x,
    pool,
    page_table,
    row_ids,
    row_segments,
    ranks,
    a_chunks,
    table_stride,
    x_stride,
    MAX_RANK: tl.constexpr,
    IN: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """hidden[n, r] = sum_k A_g[r, k] x[row_n, k], with g the adapter of entry n."""
    r, n = tl.program_id(0), tl.program_id(1)
    g = tl.load(row_segments + n)
    if r < tl.load(ranks + g):
        row = tl.load(row_ids + n).to(tl.int64)
        PER_CHUNK: tl.constexpr = CHUNK // PIECE
        first = tl.load(a_chunks + g) + r * (IN // CHUNK)
        piece, inner = tl.arange(0, PIECES), tl.arange(0, PIECE)
        total = tl.zeros((PIECES, PIECE), tl.float32)
        for start in range(0, IN // PIECE, PIECES):
            column = (start + piece) * PIECE
            inside = column < IN
            chunk = first + (start + piece) // PER_CHUNK
            page = tl.load(page_table + g * table_stride + chunk // PER_PAGE, mask=inside, other=0)
            # In whole pieces, so that the compiler sees that loads are aligned to 16 bytes.
            at = chunk % PER_PAGE * PER_CHUNK + (start + piece) % PER_CHUNK
            at = (page.to(tl.int64) * (PER_PAGE * PER_CHUNK) + at) * PIECE
            a = tl.load(pool + at[:, None] + inner[None, :], mask=inside[:, None], other=0.0)
            x_at = x + row * x_stride + column[:, None] + inner[None, :]
            x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
            total += a.to(tl.float32) * x_tile.to(tl.float32)
        tl.store(hidden + n * MAX_RANK + r, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _expand_kernel(
    y,
    hidden,
    pool,
    page_table,
    row_ids,
    row_segments,
    ranks,
    b_chunks,
    table_stride,
    y_stride,
    MAX_RANK: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_PAGE: tl.constexpr,
    PIECE: tl.constexpr,
    RANK_TILE: tl.constexpr,
):
    """y[row_n, j] += sum_r hidden[n, r] B_g[r, j] for one tile of columns j."""
    tile, n = tl.program_id(0), tl.program_id(1)
    g = tl.load(row_segments + n)
    rank = tl.load(ranks + g)
    if rank > 0:
        row = tl.load(row_ids + n).to(tl.int64)
        PER_CHUNK: tl.constexpr = CHUNK // PIECE
        first = tl.load(b_chunks + g) + tile // PER_CHUNK
        r, inner = tl.arange(0, RANK_TILE), tl.arange(0, PIECE)
        total = tl.zeros((PIECE,), tl.float32)
        for start in range(0, rank, RANK_TILE):
            inside = start + r < rank
            chunk = first + (start + r) * (OUT // CHUNK)
            page = tl.load(page_table + g * table_stride + chunk // PER_PAGE, mask=inside, other=0)
            at = chunk % PER_PAGE * PER_CHUNK + tile % PER_CHUNK
            at = (page.to(tl.int64) * (PER_PAGE * PER_CHUNK) + at) * PIECE
            b = tl.load(pool + at[:, None] + inner[None, :], mask=inside[:, None], other=0.0)
            h = tl.load(hidden + n * MAX_RANK + start + r, mask=inside, other=0.0)
            total += tl.sum(h[:, None] * b.to(tl.float32), 0)
        y_at = y + row * y_stride + tile * PIECE + inner
        tl.store(y_at, (tl.load(y_at).to(tl.float32) + total).to(y.dtype.element_ty))


class PerTokenBgmv:
    """Two launches per projection; the hidden vectors stay in float32 between them."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._row_segments = site.row_segments()
        tables = (site.batch.ranks, site.batch.a_chunks, site.batch.b_chunks)
        self._slices = [
            (column, width, *(table[site.layer, :, projection].contiguous() for table in tables))
            for column, width, projection in zip(
                site.columns, site.out_features, site.projections, strict=True
            )
        ]
        self._max_rank = max(1, site.max_rank())
        num_rows = len(site.batch.row_ids)
        self._hidden = site.pool_layer.new_empty(num_rows, self._max_rank, dtype=torch.float32)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the delta to `y` in place."""
        for column, width, ranks, a_chunks, b_chunks in self._slices:
            self._shrink(x, ranks, a_chunks)
            self._expand(y[:, column : column + width], ranks, b_chunks)

    def _shrink(self, x: torch.Tensor, ranks: torch.Tensor, a_chunks: torch.Tensor) -> None:
        site, batch = self._site, self._site.batch
        piece = _piece(batch.chunk_elems)
        _shrink_kernel[(self._max_rank, len(batch.row_ids))](
            self._hidden,
            x,
            site.pool_layer,
            batch.page_table,
            batch.row_ids,
            self._row_segments,
            ranks,
            a_chunks,
            batch.page_table.stride(0),
            x.stride(0),
            MAX_RANK=self._max_rank,
            IN=site.in_features,
            CHUNK=batch.chunk_elems,
            PER_PAGE=site.pool_layer.shape[1] // batch.chunk_elems,
            PIECE=piece,
            PIECES=_TILE_ELEMS // piece,
            num_warps=4,
        )

    def _expand(self, y: torch.Tensor, ranks: torch.Tensor, b_chunks: torch.Tensor) -> None:
        site, batch = self._site, self._site.batch
        piece = _piece(batch.chunk_elems)
        _expand_kernel[(y.shape[1] // piece, len(batch.row_ids))](
            y,
            self._hidden,
            site.pool_layer,
            batch.page_table,
            batch.row_ids,
            self._row_segments,
            ranks,
            b_chunks,
            batch.page_table.stride(0),
            y.stride(0),
            MAX_RANK=self._max_rank,
            OUT=y.shape[1],
            CHUNK=batch.chunk_elems,
            PER_PAGE=site.pool_layer.shape[1] // batch.chunk_elems,
            PIECE=piece,
            RANK_TILE=_RANK_TILE,
            num_warps=4,
        )


def _piece(chunk_elems: int) -> int:
    """The largest power of two that divides a chunk, at most 256: no tile crosses a chunk."""
    return min(256, chunk_elems & -chunk_elems)
