"""One linear layer, stored in the form that its device multiplies fastest.

On a CPU the weight is packed once: for our own kernels where there is a compiler, for oneDNN where
there is none. Either way a row's result does not depend on how many rows are beside it, to the
last bit ("same answer in any company"); that of `F.linear` does.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from loraplex_kernels.native import load_native
from loraplex_kernels.packed_linear import PackedLinear
from loraplex_server.model.errors import UnsupportedModel

#: How weights are rounded besides to the model's dtype.
Quantization = Literal["none", "int8"]

_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class Linear:
    """`x W^T + b`; filled through `weight` and `bias`, then packed, then only called.

    Attributes:
        bias: `[out]`, or None.
        packed: what the kernels take, once packed for them.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight: torch.Tensor | None = weight
        self.bias = bias
        self.packed: PackedLinear | None = None
        self._is_onednn = False

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, to be filled; in a layout of its own, or gone, once packed."""
        assert self._weight is not None, "packed already"
        return self._weight

    @property
    def is_int8(self) -> bool:
        return self.packed is not None and self.packed.is_int8

    @property
    def num_bytes(self) -> int:
        if self.packed is not None:
            return self.packed.num_bytes
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors)

    def pack(self, *, is_int8: bool = False) -> None:
        """Give the weight its fastest layout; the dense one is dropped. Once, after filling.

        Args:
            is_int8: round the weight to int8.

        Raises:
            UnsupportedModel: our own kernels, which int8 needs, do not take such a weight.
        """
        native = load_native() if PackedLinear.takes(self.weight) else None
        if is_int8 and native is None:
            reason = f"needs compiled kernels, and linears of an even width: {self.weight.shape}"
            raise UnsupportedModel(field="quantization", value="int8", reason=reason)
        if native is not None:
            self.packed = PackedLinear(native, self.weight, self.bias, is_int8=is_int8)
            self._weight = None
        elif can_pack(self.weight):
            # Without a number of rows: the layout for many serves few rows as well, not vice versa.
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self._is_onednn = True

    def dense_weight(self) -> torch.Tensor:
        """Return the weight `[out, in]` in plain layout; float32 if it was rounded to int8."""
        if self.packed is not None:
            return self.packed.dense()
        return self.weight.to_dense() if self._is_onednn else self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[T, out]` for `x` `[T, in]`, in the dtype of `x`."""
        if self.packed is not None:
            return self.packed(x).to(x.dtype)
        if not self._is_onednn:
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
