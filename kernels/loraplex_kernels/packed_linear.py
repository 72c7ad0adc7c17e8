"""A linear layer whose weight lies as the compiled kernels read it (`csrc/linear.h`)."""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from loraplex_kernels.native import NativeKernels

#: Outputs whose weights lie together (PANEL), inputs of an int8 weight that share a scale (GROUP).
PANEL: Final = 48
GROUP: Final = 128

_DTYPES: Final = (torch.float32, torch.bfloat16)


class LinearStruct(ctypes.Structure):
    """`linear` of `csrc/linear.h`."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
    ]


class _Args(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.POINTER(LinearStruct)),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("T", ctypes.c_int64),
    ]


class _PackArgs(ctypes.Structure):
    _fields_ = [
        ("dense", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
    ]


class PackedLinear:
    """`x W^T + b`, summed in float32 over the inputs in their order; immutable.

    A row's result does not depend on how many rows are beside it, to the last bit. The weight is
    kept as it came, or as int8: symmetric, with one float32 scale for each group of GROUP inputs of
    an output, by which the group's sum is multiplied. An int8 weight multiplies as exactly as any
    other: all its error is in rounding it once.

    Attributes:
        struct: what the kernels take; lives as long as this object.
    """

    def __init__(
        self,
        native: NativeKernels,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        is_int8: bool = False,
    ) -> None:
        """Pack a weight.

        Args:
            weight: `[out, in]`, of a kind that `takes` accepts; not kept.
            bias: `[out]`.
            is_int8: round the weight to int8.
        """
        assert self.takes(weight)
        weight = weight.contiguous()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._native = native
        num_panels = -(-self.out_features // PANEL)
        self._packed = torch.empty(
            (num_panels, self.in_features, PANEL), dtype=torch.int8 if is_int8 else self.dtype
        )
        num_groups = -(-self.in_features // GROUP)
        self._scale = torch.empty(num_panels, num_groups, PANEL) if is_int8 else None
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(num_panels * PANEL)
            self._bias[: self.out_features] = bias
        native.call(
            "loraplex_pack_linear",
            _PackArgs(
                dense=weight.data_ptr(),
                packed=self._packed.data_ptr(),
                scale=_address(self._scale),
                K=self.in_features,
                N=self.out_features,
                is_bf16=self.dtype is torch.bfloat16,
            ),
        )
        self.struct = LinearStruct(
            weight=self._packed.data_ptr(),
            scale=_address(self._scale),
            bias=_address(self._bias),
            K=self.in_features,
            N=self.out_features,
            is_bf16=self.dtype is torch.bfloat16,
        )

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Whether such a weight can be packed: on the CPU, and of pairs of inputs if bfloat16."""
        if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
            return False
        return weight.dtype is torch.float32 or weight.shape[1] % 2 == 0

    @property
    def is_int8(self) -> bool:
        return self._scale is not None

    @property
    def num_bytes(self) -> int:
        parts = (self._packed, self._scale, self._bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dense(self) -> torch.Tensor:
        """Return the weight `[out, in]`; float32 if it was rounded to int8."""
        panels, width = self._packed.shape[0], self.in_features
        if self.is_int8 or self.dtype is torch.float32:
            dense = self._packed.transpose(1, 2)
        else:
            pairs = self._packed.view(panels, width // 2, PANEL, 2)
            dense = pairs.transpose(1, 2)
        dense = dense.reshape(panels * PANEL, width)[: self.out_features].contiguous()
        if self._scale is None:
            return dense
        scale = self._scale.repeat_interleave(GROUP, 1)[:, :width].transpose(1, 2)
        return dense * scale.reshape(panels * PANEL, width)[: self.out_features]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 `[T, out]` for `x` `[T, in]` of the dtype that the weight came in."""
        assert x.dtype is self.dtype
        x = x.contiguous()
        y = torch.empty((x.shape[0], self.out_features))
        args = _Args(
            layer=ctypes.pointer(self.struct), x=x.data_ptr(), y=y.data_ptr(), T=x.shape[0]
        )
        self._native.call("loraplex_linear", args)
        return y


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
