"""Products and roundings that mean the same compiled and interpreted; other kernels call them."""

# Triton reads the annotations of a kernel as types of its own: only constexprs have one.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

#: Kernels under `TRITON_INTERPRET=1` are plain numpy; triton fixes that when it decorates them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Launch option: a product and a sum round one by one, as written, on every chip and compiler.
STRICT: Final = {"enable_fp_fusion": False}


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round float32 `x` to `DTYPE`, to nearest even; the interpreter would cut bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded, 0x7FC00000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """`a b + acc` in float32; the interpreter multiplies no bfloat16, the products are exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
