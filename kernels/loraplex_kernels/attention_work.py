"""What the attention kernels do in a step, as flat int32 tables built on the host.

A table never depends on the layer, so one set serves a whole forward pass. Tiles and splits depend
on the model's shape alone, never on the step: that makes a row's result the same in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.batch import AttentionBatch
from loraplex_kernels.static_tables import copy_tables

IntArray = npt.NDArray[np.int32]

#: Positions of `AttentionWork.counts`.
NUM_DECODE_ITEMS, NUM_DECODE_SEQUENCES, NUM_PREFILL_ITEMS = range(3)

#: Slot of a padding row: its K and V are written nowhere.
NO_SLOT = -1


@dataclass(frozen=True)
class AttentionTiling:
    """How attention of one model is cut into pieces.

    Attributes:
        head_dim_padded: head_dim rounded up to a power of two.
        head_tile: rows of a decode tile, the query heads of one KV head, rounded up.
        split_tokens: KV tokens of one decode item.
        decode_tokens: KV tokens that decode takes at a time; divides `split_tokens`.
        prefill_rows: rows of a prefill tile, `query_tile` queries times the heads of a KV head.
        prefill_tokens: KV tokens that prefill takes at a time.
        query_tile: queries of a prefill item.
    """

    head_dim_padded: int
    head_tile: int
    split_tokens: int
    decode_tokens: int
    prefill_rows: int
    prefill_tokens: int
    query_tile: int

    @classmethod
    def of(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        elem_bytes: int,
        capability: int = 90,
        split_tokens: int = 256,
    ) -> AttentionTiling:
        """Choose tiles that fit registers and shared memory without spilling.

        Args:
            num_heads: query heads.
            num_kv_heads: heads of K and V.
            head_dim: elements of a head.
            elem_bytes: of the model's dtype.
            capability: compute capability of the chip, ten times the version.
            split_tokens: KV tokens of one decode item.
        """
        groups = num_heads // num_kv_heads
        padded = max(16, _power_of_two(head_dim))
        is_half = elem_bytes == 2
        # 16 KiB of K in flight per stage.
        decode_tokens = min(128, split_tokens, max(16, 16384 // (padded * elem_bytes)))
        # Before 9.0, Q and the scores of a tile of 64 tokens do not fit beside 128 columns.
        is_wide = padded > (128 if capability >= 90 else 64)
        rows, tokens = (128 if padded == 128 else 64), (32 if is_wide else 64)
        if not is_half:  # no tensor cores: operands lie in registers
            rows = tokens = 16 if padded > 64 else 32
        rows = max(rows, _power_of_two(groups))
        return cls(
            head_dim_padded=padded,
            head_tile=max(16, _power_of_two(groups)),
            split_tokens=split_tokens,
            decode_tokens=decode_tokens,
            prefill_rows=rows,
            prefill_tokens=tokens,
            query_tile=rows // groups,
        )


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class AttentionWork:
    """The tables of one step on the host; every array is int32 and contiguous.

    Attributes:
        pages: `[sum of pages]`, the block tables of all sequences, one after the other.
        page_start: `[S]`, where each sequence begins in `pages`.
        context_lens: `[S]`, tokens of KV each sequence has after this step's write.
        query_start: `[S + 1]`, first token row of each sequence.
        decode_items: `[N, 2]`, (sequence, split): one query over `split_tokens` of its KV.
        item_start: `[num_decode + 1]`, first decode item of each sequence that decodes.
        prefill_items: `[N, 2]`, (sequence, tile): its new queries among positions
            `[tile * query_tile, (tile + 1) * query_tile)`. Longest context first, so that the last
            programs to start are the short ones.
        counts: `[3]`, decode items, sequences that decode, prefill items. The kernels read these
            from device memory: the tables they come with may be larger, and stale beyond.
        positions: `[T]`, position of each token in its sequence; 0 for a padding row.
        slots: `[T]`, `page * page_tokens + offset` that takes a token's K and V, or `NO_SLOT`.
    """

    pages: IntArray
    page_start: IntArray
    context_lens: IntArray
    query_start: IntArray
    decode_items: IntArray
    item_start: IntArray
    prefill_items: IntArray
    counts: IntArray
    positions: IntArray
    slots: IntArray

    def to(self, device: torch.device) -> AttentionTables:
        """Copy every table to `device` in one transfer."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        return AttentionTables(*copy_tables(arrays, device))


@dataclass(frozen=True)
class AttentionTables:
    """`AttentionWork` on the device, field by field; int32 tensors.

    They may be larger than a step needs: `counts` says what is valid. Only the lengths of
    `decode_items`, `item_start` and `prefill_items` bound how many programs are launched.
    """

    pages: torch.Tensor
    page_start: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    decode_items: torch.Tensor
    item_start: torch.Tensor
    prefill_items: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


def build_attention_work(
    batch: AttentionBatch,
    *,
    page_tokens: int,
    tiling: AttentionTiling,
    num_rows: int | None = None,
) -> AttentionWork:
    """Lay out the items of a step.

    Args:
        batch: the step, in host memory.
        page_tokens: tokens of a page.
        tiling: how the model's attention is cut.
        num_rows: token rows after padding; default: as many as the step has.
    """
    contexts = batch.context_lens.numpy()
    query_start = batch.query_indptr.numpy()
    num_decode = batch.num_decode
    pages_per_sequence = -(-contexts // page_tokens)
    page_sequences, page_columns, page_start = _expand(pages_per_sequence)
    decode_sequences, splits, item_start = _expand(-(-contexts[:num_decode] // tiling.split_tokens))
    prefill_items = _prefill_items(query_start, contexts, num_decode, tiling.query_tile)
    num_items = len(decode_sequences), num_decode, len(prefill_items)
    slots = batch.slot_pages.numpy() * page_tokens + batch.slot_offsets.numpy()
    return AttentionWork(
        pages=batch.block_tables.numpy()[page_sequences, page_columns],
        page_start=page_start[:-1],
        context_lens=contexts,
        query_start=query_start,
        decode_items=np.stack((decode_sequences, splits), axis=1),
        item_start=item_start,
        prefill_items=prefill_items,
        counts=np.array(num_items, dtype=np.int32),
        positions=_pad(batch.positions.numpy(), num_rows, 0),
        slots=_pad(slots, num_rows, NO_SLOT),
    )


def _expand(counts: npt.NDArray[np.int32]) -> tuple[IntArray, IntArray, IntArray]:
    """Return owner and rank of each of `sum(counts)` entries, and the prefix sums `[S + 1]`."""
    start = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=start[1:])
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return owners, np.arange(start[-1], dtype=np.int32) - start[owners], start


def _prefill_items(
    query_start: IntArray, contexts: IntArray, num_decode: int, query_tile: int
) -> IntArray:
    stops = contexts[num_decode:]
    first_tiles = (stops - np.diff(query_start)[num_decode:]) // query_tile
    sequences, ranks, _ = _expand(-(-stops // query_tile) - first_tiles)
    tiles = first_tiles[sequences] + ranks
    order = np.argsort(-tiles, kind="stable")
    return np.stack((sequences[order] + np.int32(num_decode), tiles[order]), axis=1)


def _pad(values: npt.NDArray[np.int64], num_rows: int | None, filler: int) -> IntArray:
    """Return `values` as int32, with `filler` behind them up to `num_rows`."""
    rows = len(values) if num_rows is None else num_rows
    assert rows >= len(values), "a step has more tokens than rows"
    padded = np.full(rows, filler, dtype=np.int32)
    padded[: len(values)] = values
    return padded
