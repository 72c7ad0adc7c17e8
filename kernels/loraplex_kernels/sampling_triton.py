"""From logits to tokens on the device: one launch for any mix of greedy and drawn rows.

Semantics are those of `draw.py` in the server's model package: temperature, top-k, top-p and min-p
as thresholds in that order, then the inverse of the cumulative distribution, in vocabulary order,
at the row's uniform number. One program per row: no row can see another, and nothing is read back,
so that a CUDA graph can hold the launch.

A greedy row costs one pass over its logits, a drawn one about two and a half, a filtered one mostly
three and a little (`sampling_passes`). One program per row is enough: a pass of one multiprocessor
over 128k logits takes some microseconds, as the second launch that a split row needs would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from loraplex_kernels.sampling_passes import (
    distance_of,
    find_peak,
    invert_cumulative,
    key_of,
    narrow_to,
)

if TYPE_CHECKING:
    from loraplex_kernels.aot import AotCase, ModelShape

#: Rows of the table of parameters, in this order: float64 `[5, S]`. A temperature of 0 is greedy, a
#: top-k of 0 and a top-p of 1 are off.
TABLE_FIELDS: Final = ("temperature", "top_k", "top_p", "min_p", "uniform")

#: Tokens of one block of a pass. Twice as many, and the kernel spills under triton 3.6.
BLOCK: Final = 2048

#: The most tokens of a row that are moved together.
CAPACITY: Final = 4096

#: The pass for the maximum keeps little per lane, so it reads more at once.
_WIDE: Final = 4

_NUM_WARPS: Final = 16

_LOG2_E = tl.constexpr(1.4426950408889634)


class SamplingScratch:
    """Where rows move the tokens that their filters may keep; contents mean nothing between calls.

    Args:
        num_rows: most rows of one call.
        device: the device of the logits.
        capacity: tokens per row, a multiple of 4. A row that keeps more is still right, and slower.
    """

    def __init__(self, num_rows: int, device: torch.device, capacity: int = CAPACITY) -> None:
        self.logits = torch.empty(num_rows, capacity, dtype=torch.float32, device=device)
        self.ids = torch.empty(num_rows, capacity, dtype=torch.int32, device=device)


def sample_rows(
    logits: torch.Tensor,
    table: torch.Tensor,
    outcome: torch.Tensor,
    scratch: SamplingScratch,
    *,
    block: int = BLOCK,
) -> None:
    """Choose one token per row; launches one kernel and waits for nothing.

    Args:
        logits: float32 `[S, V]`, last dimension contiguous; not changed.
        table: float64 `[5, >= S]`, rows as `TABLE_FIELDS`.
        outcome: int64 `[2, >= S]`, written: the token, and 1 where the row's maximum is finite and
            no logit is NaN. The token of a row that is not finite is some id below `V`.
        scratch: of at least `S` rows.
        block: tokens of one block, a power of two and at least 4.
    """
    S, V = logits.shape
    assert all(tensor.stride(1) == 1 for tensor in (logits, table, outcome))
    assert min(table.shape[1], outcome.shape[1], scratch.ids.shape[0]) >= S
    if S == 0:
        return
    _sample_kernel[(S,)](
        logits,
        logits.stride(0),
        V,
        table,
        table.stride(0),
        outcome,
        outcome.stride(0),
        scratch.logits,
        scratch.ids,
        CAPACITY=scratch.ids.shape[1],
        IS_ALIGNED=logits.data_ptr() % 16 == logits.stride(0) % 4 == V % 4 == 0,
        BLOCK=block,
        WIDE_BLOCK=_WIDE * block,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _sample_kernel(
    logits_ptr,
    logits_stride,
    vocab,
    table_ptr,
    table_stride,
    outcome_ptr,
    outcome_stride,
    near_logits_ptr,
    near_ids_ptr,
    CAPACITY: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
):
    """`outcome[0, s] = token of logits[s]` under `table[:, s]`; `outcome[1, s]` = is it finite."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    peak, token, is_finite = find_peak(row_ptr, vocab, IS_ALIGNED, WIDE_BLOCK)
    temperature = tl.load(table_ptr + row)
    if (temperature > 0) & is_finite:
        scale = _LOG2_E / tl.maximum(temperature.to(tl.float32), 1e-5)  # draw.MIN_TEMPERATURE
        top_k = tl.load(table_ptr + table_stride + row).to(tl.int32)
        top_p = tl.load(table_ptr + 2 * table_stride + row)
        min_p = tl.load(table_ptr + 3 * table_stride + row).to(tl.float32)
        uniform = tl.load(table_ptr + 4 * table_stride + row)
        near_at = row.to(tl.int64) * CAPACITY
        token = _draw(
            row_ptr, vocab, peak, scale, top_k, top_p, min_p, uniform,
            near_logits_ptr + near_at, near_ids_ptr + near_at, CAPACITY, IS_ALIGNED, BLOCK,
        )  # fmt: skip
    tl.store(outcome_ptr + row, token.to(tl.int64))
    tl.store(outcome_ptr + outcome_stride + row, is_finite.to(tl.int64))


@triton.jit
def _draw(
    row_ptr,
    vocab,
    peak,
    scale,
    top_k,
    top_p,
    min_p,
    uniform,
    near_logits_ptr,
    near_ids_ptr,
    CAPACITY: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the token drawn from a row with a finite peak; `scale` is `log2(e) / temperature`."""
    has_top_k = (top_k > 0) & (top_k < vocab)
    has_top_p = top_p < 1.0
    values_ptr, n, is_moved = row_ptr, vocab, 0
    # Distances in units of the temperature: most filters end inside the first two, and beyond the
    # third the weights are 0 in float32, so that it stands for the whole vocabulary.
    unit = _LOG2_E / scale
    near, half, far = key_of(3.0 * unit), key_of(9.0 * unit), key_of(128.0 * unit)
    cut = float("inf")
    if has_top_k:
        values_ptr, n, is_moved, far = narrow_to(
            values_ptr, n, is_moved, peak, scale, near, half, far, top_k, 0.0,
            near_logits_ptr, near_ids_ptr, CAPACITY, IS_ALIGNED, BLOCK,
        )  # fmt: skip
        near, half = far // 4, far // 2
        cut = distance_of(far)
    if has_top_p:
        values_ptr, n, is_moved, far = narrow_to(
            values_ptr, n, is_moved, peak, scale, near, half, far, 0, top_p,
            near_logits_ptr, near_ids_ptr, CAPACITY, IS_ALIGNED, BLOCK,
        )  # fmt: skip
        cut = distance_of(far)
    token = invert_cumulative(values_ptr, n, peak, scale, cut, min_p, uniform, IS_ALIGNED, BLOCK)
    if is_moved != 0:
        token = tl.load(near_ids_ptr + token)
    return token


def aot_cases(shape: ModelShape) -> list[AotCase]:
    """Return the variants that serving `shape` launches; see `loraplex_kernels.aot`."""
    from loraplex_kernels.aot import AotCase

    names = _sample_kernel.arg_names
    signature = dict.fromkeys(names, "i32")
    signature |= {"logits_ptr": "*fp32", "table_ptr": "*fp64", "outcome_ptr": "*i64"}
    signature |= {"near_logits_ptr": "*fp32", "near_ids_ptr": "*i32"}
    # The launcher finds the width and stride of every vocabulary we serve divisible by 16.
    aligned = [i for i, name in enumerate(names) if name.endswith("ptr")]
    aligned += [names.index("logits_stride"), names.index("vocab")]
    assert shape.vocab_size % 16 == 0
    return [
        AotCase(
            name=f"sample block {BLOCK}",
            fn=_sample_kernel,
            signature=signature,
            constexprs={
                "CAPACITY": CAPACITY,
                "IS_ALIGNED": True,
                "BLOCK": BLOCK,
                "WIDE_BLOCK": _WIDE * BLOCK,
            },
            attrs={(i,): [["tt.divisibility", 16]] for i in sorted(aligned)},
            num_warps=_NUM_WARPS,
        )
    ]
