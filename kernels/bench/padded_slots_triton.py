"""Padded slots: the algorithm of vLLM's Triton LoRA kernels, from its description.

Weights are stacked as `[slots, max_rank, in]` and `[slots, out, max_rank]`, zero-filled beyond the
true rank. Tokens are sorted by adapter. Shrink splits K and adds its parts with atomics into a
zeroed float32 buffer; the grid holds `tokens / BLOCK_M` row tiles for *every* active adapter, and a
tile beyond its adapter's tokens leaves at once. Expand adds into the output. Slices (q k v, gate
up) share a launch. Kinder than the original in three ways: the grid covers only adapters that are
in the batch, row tiles are 16 and not 32 in decode, and the split of K follows the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from baseline_site import Site

_PROGRAMS_WANTED = 4 * 132  # four programs on each multiprocessor of an H200
_INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _shrink_kernel(
    hidden,
    x,
    a,
    row_ids,
    seg_indptr,
    num_rows,
    x_stride,
    SLICES: tl.constexpr,
    RANK: tl.constexpr,
    IN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """hidden[s, n, r] += sum over this split's k of A[g, s, r, k] x[row_n, k]."""
    split = tl.program_id(0) % SPLITS
    r_tile = tl.program_id(0) // SPLITS % tl.cdiv(RANK, BLOCK_R)
    m_tile = tl.program_id(0) // (SPLITS * tl.cdiv(RANK, BLOCK_R))
    s, g = tl.program_id(1), tl.program_id(2)
    start = tl.load(seg_indptr + g) + m_tile * BLOCK_M
    stop = tl.load(seg_indptr + g + 1)
    if start >= stop:
        return
    n = start + tl.arange(0, BLOCK_M)
    r = r_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(row_ids + n, mask=n < stop, other=0).to(tl.int64)
    a_row = (g * SLICES + s).to(tl.int64) * RANK + r
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(split * BLOCK_K, IN, SPLITS * BLOCK_K):
        inside = first + k < IN
        x_at = x + row[:, None] * x_stride + first + k[None, :]
        x_tile = tl.load(x_at, mask=(n < stop)[:, None] & inside[None, :], other=0.0)
        a_at = a + a_row[None, :] * IN + first + k[:, None]
        a_tile = tl.load(a_at, mask=(r < RANK)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            x_tile, a_tile = x_tile.to(tl.float32), a_tile.to(tl.float32)
        total += tl.dot(x_tile, a_tile, input_precision="ieee")
    at = hidden + (s.to(tl.int64) * num_rows + n[:, None]) * RANK + r[None, :]
    inside = (n < stop)[:, None] & (r < RANK)[None, :]
    if SPLITS == 1:
        tl.store(at, total, mask=inside)
    else:
        tl.atomic_add(at, total, mask=inside, sem="relaxed")


@triton.jit
def _expand_kernel(
    y,
    hidden,
    b,
    row_ids,
    seg_indptr,
    columns,
    num_rows,
    y_stride,
    b_stride,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N_TILES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[row_n, column_s + j] += sum_r hidden[s, n, r] B[g, column_s + j, r]."""
    n_tile = tl.program_id(0) % N_TILES
    m_tile = tl.program_id(0) // N_TILES
    s, g = tl.program_id(1), tl.program_id(2)
    start = tl.load(seg_indptr + g) + m_tile * BLOCK_M
    stop = tl.load(seg_indptr + g + 1)
    j = tl.load(columns + s) + n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(columns + s + 1)
    if start >= stop or tl.load(columns + s) + n_tile * BLOCK_N >= end:
        return
    n = start + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    row = tl.load(row_ids + n, mask=n < stop, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, RANK, BLOCK_R):
        inside = first + r < RANK
        h_at = hidden + (s.to(tl.int64) * num_rows + n[:, None]) * RANK + first + r[None, :]
        h_tile = tl.load(h_at, mask=(n < stop)[:, None] & inside[None, :], other=0.0)
        b_at = b + g.to(tl.int64) * b_stride + j[None, :] * RANK + first + r[:, None]
        b_tile = tl.load(b_at, mask=(j < end)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            b_tile = b_tile.to(tl.float32)
        total += tl.dot(h_tile.to(b_tile.dtype), b_tile, input_precision="ieee")
    y_at = y + row[:, None] * y_stride + j[None, :]
    inside = (n < stop)[:, None] & (j < end)[None, :]
    y_tile = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, (y_tile + total).to(y.dtype.element_ty), mask=inside)


class PaddedSlots:
    """A zero fill and two launches per site; every adapter costs the bytes of the largest rank."""

    def __init__(self, site: Site) -> None:
        batch, pool = site.batch, site.pool_layer
        self._batch = batch
        self._columns_host = [*site.columns, sum(site.out_features)]
        self._widest = max(site.out_features)
        num_slices, rank = len(site.projections), max(1, site.max_rank())
        self._a = pool.new_zeros(batch.num_segments, num_slices, rank, site.in_features)
        self._b = pool.new_zeros(batch.num_segments, self._columns_host[-1], rank)
        for g, s, a, b in site.matrices():
            self._a[g, s, : len(a)] = a
            self._b[g, self._columns_host[s] : self._columns_host[s + 1], : len(b)] = b.T
        self._columns = torch.tensor(self._columns_host, dtype=torch.int32, device=pool.device)
        self._num_rows = len(batch.row_ids)
        self._hidden = pool.new_empty(num_slices, self._num_rows, rank, dtype=torch.float32)
        self._block_m = 16 if self._num_rows <= 32 * batch.num_segments else 32

    @property
    def weight_bytes(self) -> int:
        """Bytes of A and B that a step reads, padding included."""
        return (self._a.numel() + self._b.numel()) * self._a.element_size()

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the delta to `y` in place."""
        self._shrink(x)
        self._expand(y)

    def _shrink(self, x: torch.Tensor) -> None:
        num_adapters, num_slices, rank, in_features = self._a.shape
        block_r, block_k = min(32, max(16, triton.next_power_of_2(rank))), 256
        m_tiles, r_tiles = triton.cdiv(self._num_rows, self._block_m), triton.cdiv(rank, block_r)
        busy = num_adapters * num_slices * r_tiles
        splits = min(16, triton.cdiv(in_features, block_k), triton.cdiv(_PROGRAMS_WANTED, busy))
        if splits > 1:
            self._hidden.zero_()
        _shrink_kernel[(m_tiles * r_tiles * splits, num_slices, num_adapters)](
            self._hidden,
            x,
            self._a,
            self._batch.row_ids,
            self._batch.seg_indptr,
            self._num_rows,
            x.stride(0),
            SLICES=num_slices,
            RANK=rank,
            IN=in_features,
            SPLITS=splits,
            BLOCK_M=self._block_m,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            UPCAST=_INTERPRETED,
            num_warps=4,
            num_stages=3,  # as many blocks in flight as our own shrink has
        )

    def _expand(self, y: torch.Tensor) -> None:
        num_adapters, num_slices, rank, _ = self._a.shape
        block_n, block_r = 128, min(64, max(16, triton.next_power_of_2(rank)))
        m_tiles, n_tiles = (
            triton.cdiv(self._num_rows, self._block_m),
            triton.cdiv(self._widest, block_n),
        )
        _expand_kernel[(m_tiles * n_tiles, num_slices, num_adapters)](
            y,
            self._hidden,
            self._b,
            self._batch.row_ids,
            self._batch.seg_indptr,
            self._columns,
            self._num_rows,
            y.stride(0),
            self._b.stride(0),
            RANK=rank,
            BLOCK_M=self._block_m,
            BLOCK_N=block_n,
            BLOCK_R=block_r,
            N_TILES=n_tiles,
            UPCAST=_INTERPRETED,
            num_warps=4,
            num_stages=2,
        )
