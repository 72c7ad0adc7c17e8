"""One linear layer, stored in the form that its device multiplies fastest.

On CPU the weight is handed to oneDNN once, in oneDNN's blocked layout. Against `F.linear` (MKL,
which lays the weight out anew in every call) that halves the time from 1 to 256 rows on AVX-512
machines from AMD, where decoding is nothing but these products. And a row's result does not depend
on how many rows are beside it, to the last bit; MKL's does ("same answer in any company").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class Linear:
    """`x W^T + b`; filled through `weight` and `bias`, then packed, then only called.

    Attributes:
        weight: `[out, in]`; in oneDNN's layout once packed.
        bias: `[out]`, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._is_packed = False

    @property
    def num_bytes(self) -> int:
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors)

    def pack(self) -> None:
        """Give the weight its fastest layout; the dense one is dropped. Once, after filling."""
        if can_pack(self.weight):
            # Without a number of rows: the layout for many serves few rows as well, not vice versa.
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self._is_packed = True

    def dense_weight(self) -> torch.Tensor:
        """Return the weight `[out, in]` in plain layout."""
        return self.weight.to_dense() if self._is_packed else self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[T, out]` for `x` `[T, in]`, in the dtype of `x`."""
        if not self._is_packed:
            return F.linear(x, self.weight, self.bias)
        if x.shape[0] == 1:
            # oneDNN sums one row in another order than several; two rows cost the same.
            return self._multiply(x.repeat(2, 1))[:1]
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return result


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether this machine's oneDNN takes a weight of this dtype and device."""
    is_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not is_available:
        return False
    # Private operations: another torch may not have them, and F.linear needs none of them.
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
