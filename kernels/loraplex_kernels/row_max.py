"""The largest value of each row and its place: greedy sampling over a vocabulary."""

from __future__ import annotations

import ctypes

import torch

from loraplex_kernels.native import load_native, struct_fields


class _Args(ctypes.Structure):
    _fields_ = struct_fields("rows values ids", "N V")


def row_max(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maxima of float32 `[N, V]`, `[N]`, and their first places, int64 `[N]`.

    A row with a NaN has NaN as its maximum, and any place.
    """
    native = load_native() if rows.device.type == "cpu" else None
    if native is None or rows.dtype is not torch.float32 or not rows.is_contiguous():
        values, ids = rows.max(-1)
        return values, ids
    values = torch.empty(rows.shape[0])
    ids = torch.empty(rows.shape[0], dtype=torch.int64)
    args = _Args(
        rows=rows.data_ptr(),
        values=values.data_ptr(),
        ids=ids.data_ptr(),
        N=rows.shape[0],
        V=rows.shape[1],
    )
    native.call("loraplex_row_max", args)
    return values, ids
