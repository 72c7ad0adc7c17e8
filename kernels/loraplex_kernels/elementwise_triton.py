"""The work between the matrix products, in Triton: norms, rotation and KV write, SiLU.

Import it only where there is a GPU or the interpreter. Each kernel rounds where `reference.py`
rounds. Inputs may be strided by row; their rows are contiguous.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
import triton.language as tl

from loraplex_kernels.aot import AotCase, ModelShape
from loraplex_kernels.arithmetic import STRICT, narrow

#: Left alone, the compiler for 10.0 spills a few registers to fit twice as many programs.
_ROTATION_OPTIONS: Final = {**STRICT, "maxnreg": 128}

#: Elements of one program of `silu_mul`, and heads of one program of `rotate_and_store`.
_SILU_BLOCK: Final = 1024
_HEAD_TILE: Final = 16


@triton.jit
def _norm(x, weight, inverse_rms):
    """`round(x * inverse_rms) * weight`, both rounded to the dtype of `weight`."""
    normed = narrow(x * inverse_rms, weight.dtype).to(tl.float32)
    return narrow(normed * weight.to(tl.float32), weight.dtype)


@triton.jit
def rms_norm_kernel(
    out,
    x,
    residual,
    weight,
    eps,
    x_stride,
    residual_stride,
    weight_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SUM: tl.constexpr,
):
    """`out = round(s / rms(s)) * weight` with `s = x`, or `s = residual = round(x + residual)`.

    One program per row; the row is read once. `weight_stride` is 0 for one weight of all rows.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    s = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + row * weight_stride + column, mask=inside, other=0.0)
    if IS_SUM:
        at = residual + row * residual_stride + column
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        s = narrow(s, w.dtype)
        tl.store(at, s, mask=inside)
        s = s.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(s * s, 0) / WIDTH + eps)
    tl.store(out + row * out_stride + column, _norm(s, w, inverse_rms), mask=inside)


@triton.jit
def silu_mul_kernel(out, gate_up, stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`out = round(gate / (1 + e^-gate)) * up`; one program per row and `BLOCK` columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + row * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0)
    silu = narrow(gate / (1.0 + tl.exp(-gate)), up.dtype).to(tl.float32)
    tl.store(out + row * out_stride + column, narrow(silu * up.to(tl.float32), up.dtype), inside)


@triton.jit
def _square_sum(x):
    """`sum_d x_d^2` of each head, in float32."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit
def _head_norm(x, q_norm, k_norm, dim, stop, is_q, is_v, inverse_rms):
    """The RMSNorm of q and k heads with their weights at `dim < stop`; v heads pass through."""
    of_q = tl.load(q_norm + dim, mask=dim < stop, other=0.0)[None, :]
    of_k = tl.load(k_norm + dim, mask=dim < stop, other=0.0)[None, :]
    return tl.where(is_v, x, _norm(x.to(tl.float32), tl.where(is_q, of_q, of_k), inverse_rms))


@triton.jit
def _turn(x, partner, cos, sin, inside):
    """`round(round(x cos) + partner sin)`, the second product unrounded as in torch's addcmul."""
    c = tl.load(cos, mask=inside, other=0.0)[None, :].to(tl.float32)
    s = tl.load(sin, mask=inside, other=0.0)[None, :].to(tl.float32)
    part = narrow(x.to(tl.float32) * c, x.dtype).to(tl.float32)
    return narrow(tl.fma(partner.to(tl.float32), s, part), x.dtype)


@triton.jit
def rotate_and_store_kernel(
    out,
    kv,
    qkv,
    cos,
    sin,
    positions,
    slots,
    q_norm,
    k_norm,
    eps,
    stride,
    norm_stride,
    out_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROT_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """`x cos + roll(x, ROT_DIM / 2) sin` of q to `out`, of k into its page; v into its page.

    One program per token and `TILE` heads, which lie in the row as q, k, v. A head is held as the
    two halves that rotate with each other and the tail beyond `ROT_DIM` that does not; `HALF` and
    `TAIL` are their widths rounded up to powers of two, 0 for no tail. A slot below 0 stores
    nothing. `out` may be the q part of `qkv`. `norm_stride` is 0 for one pair of weights.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ROTATED: tl.constexpr = ROT_DIM // 2
    half = tl.arange(0, HALF)
    is_head = (head < HEADS + 2 * KV_HEADS)[:, None]
    in_half = is_head & (half < ROTATED)[None, :]
    low_at = qkv + token * stride + head[:, None] * HEAD_DIM + half[None, :]
    low = tl.load(low_at, mask=in_half, other=0.0)
    high = tl.load(low_at + ROTATED, mask=in_half, other=0.0)
    if TAIL > 0:
        rest = ROT_DIM + tl.arange(0, TAIL)
        in_rest = is_head & (rest < HEAD_DIM)[None, :]
        tail_at = qkv + token * stride + head[:, None] * HEAD_DIM + rest[None, :]
        tail = tl.load(tail_at, mask=in_rest, other=0.0)

    is_q = (head < HEADS)[:, None]
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    if HAS_NORM:
        q_norm += token * norm_stride
        k_norm += token * norm_stride
        squares = _square_sum(low) + _square_sum(high)
        if TAIL > 0:
            squares += _square_sum(tail)
        inverse_rms = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        low = _head_norm(low, q_norm, k_norm, half, ROTATED, is_q, is_v, inverse_rms)
        high = _head_norm(
            high, q_norm + ROTATED, k_norm + ROTATED, half, ROTATED, is_q, is_v, inverse_rms
        )
        if TAIL > 0:
            tail = _head_norm(tail, q_norm, k_norm, rest, HEAD_DIM, is_q, is_v, inverse_rms)

    angle = tl.load(positions + token).to(tl.int64) * ROT_DIM + half
    turned_low = tl.where(is_v, low, _turn(low, high, cos + angle, sin + angle, half < ROTATED))
    angle += ROTATED
    turned_high = tl.where(is_v, high, _turn(high, low, cos + angle, sin + angle, half < ROTATED))

    slot = tl.load(slots + token).to(tl.int64)
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    page_at = slot // PAGE_TOKENS * (2 * PAGE_TOKENS * ROW) + slot % PAGE_TOKENS * ROW
    kv_head = (head - HEADS)[:, None]
    kv_at = kv + page_at + kv_head // KV_HEADS * (PAGE_TOKENS * ROW)
    kv_at += kv_head % KV_HEADS * HEAD_DIM
    q_at = out + token * out_stride + head[:, None] * HEAD_DIM
    # Compared as a vector: the interpreter spreads a scalar's truth value as integers.
    is_kv = ((head >= HEADS) & (tl.zeros([TILE], tl.int64) + slot >= 0))[:, None]
    tl.store(q_at + half[None, :], turned_low, mask=in_half & is_q)
    tl.store(q_at + ROTATED + half[None, :], turned_high, mask=in_half & is_q)
    tl.store(kv_at + half[None, :], turned_low, mask=in_half & is_kv)
    tl.store(kv_at + ROTATED + half[None, :], turned_high, mask=in_half & is_kv)
    if TAIL > 0:
        tl.store(q_at + rest[None, :], tail, mask=in_rest & is_q)
        tl.store(kv_at + rest[None, :], tail, mask=in_rest & is_kv)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.rms_norm`, for `[T, H]` and weights of one or all rows; `out` may be `x`."""
    return _rms_norm(x, x, weight, eps, out, is_sum=False)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`; the sum overwrites `residual`, and `out` may be `x`."""
    return _rms_norm(x, residual, weight, eps, out, is_sum=True), residual


def _rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    *,
    is_sum: bool,
) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device) if out is None else out
    if rows:
        rms_norm_kernel[(rows,)](
            out,
            x,
            residual,
            weight,
            eps,
            x.stride(0),
            residual.stride(0),
            _row_stride(weight),
            out.stride(0),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            IS_SUM=is_sum,
            num_warps=_norm_warps(width),
            **STRICT,
        )
    return out


def _row_stride(weight: torch.Tensor) -> int:
    """Return the elements between the weights of two rows: 0 when all share one."""
    return weight.stride(0) if weight.dim() == 2 else 0


def _norm_warps(width: int) -> int:
    """Return warps that leave each thread two loads of 16 bytes at half precision."""
    return min(16, max(1, int(triton.next_power_of_2(width)) // 512))


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.silu_mul`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        silu_mul_kernel[(rows, triton.cdiv(width, _SILU_BLOCK))](
            out,
            gate_up,
            gate_up.stride(0),
            out.stride(0),
            WIDTH=width,
            BLOCK=_SILU_BLOCK,
            **STRICT,
        )
    return out


def rotate_and_store(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate the heads of each token, write its K and V, and return its queries.

    Args:
        qkv: `[T, (heads + 2 kv_heads) head_dim]`.
        kv: `[P, 2, page_tokens, kv_heads, head_dim]`, one layer of the pool; written.
        cos: `[max_len, rot_dim]`; see `RopeTable`.
        sin: `[max_len, rot_dim]`, signed.
        positions: int32 `[T]`.
        slots: int32 `[T]`, page * page_tokens + offset; a negative one writes nothing.
        q_norm: `[head_dim]`, weight of the RMSNorm of each query head, or `[T, head_dim]`; None
            for no norm.
        k_norm: given with `q_norm`, of the same shape and strides.
        eps: of the norms.
        out: `[T, heads, head_dim]`, contiguous but for the rows; the q part of `qkv` will do.
    """
    _, _, page_tokens, kv_heads, head_dim = kv.shape
    assert kv.is_contiguous(), "one layer of the pool"
    if q_norm is not None and k_norm is not None:
        assert q_norm.stride() == k_norm.stride(), "one stride serves both"
    rows, num_slices = qkv.shape[0], qkv.shape[1] // head_dim
    heads = num_slices - 2 * kv_heads
    if out is None:
        out = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows:
        rotate_and_store_kernel[(rows, triton.cdiv(num_slices, _HEAD_TILE))](
            out,
            kv,
            qkv,
            cos,
            sin,
            positions,
            slots,
            cos if q_norm is None else q_norm,
            cos if k_norm is None else k_norm,
            eps,
            qkv.stride(0),
            0 if q_norm is None else _row_stride(q_norm),
            out.stride(0),
            **_rotation_constants(heads, kv_heads, head_dim, cos.shape[1], page_tokens),
            HAS_NORM=q_norm is not None,
            num_warps=_rotation_warps(cos.shape[1]),
            **_ROTATION_OPTIONS,
        )
    return out


def _rotation_warps(rot_dim: int) -> int:
    """Return warps that leave each thread one load of 16 bytes at half precision."""
    return max(1, _HEAD_TILE * int(triton.next_power_of_2(rot_dim)) // 512)


def _rotation_constants(
    heads: int, kv_heads: int, head_dim: int, rot_dim: int, page_tokens: int
) -> dict[str, int]:
    tail = head_dim - rot_dim
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "ROT_DIM": rot_dim,
        "PAGE_TOKENS": page_tokens,
        "TILE": _HEAD_TILE,
        "HALF": triton.next_power_of_2(rot_dim // 2),
        "TAIL": triton.next_power_of_2(tail) if tail else 0,
    }


def aot_cases(shape: ModelShape) -> list[AotCase]:
    """Return the elementwise kernels that serving a model of this shape in bfloat16 launches."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    norm = {"WIDTH": hidden, "BLOCK": triton.next_power_of_2(hidden)}
    warps = _norm_warps(hidden)
    rotation = _rotation_constants(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim, shape.page_tokens
    )
    turn = {"num_warps": _rotation_warps(shape.head_dim), **_ROTATION_OPTIONS}
    silu = {"WIDTH": width, "BLOCK": _SILU_BLOCK}
    in_norm = {"num_warps": warps, **STRICT}
    case = functools.partial(AotCase.of_launch, types=_TYPES, others="*bf16")
    return [
        case("rms_norm", rms_norm_kernel, {**norm, "IS_SUM": False}, in_norm),
        case("add_rms_norm", rms_norm_kernel, {**norm, "IS_SUM": True}, in_norm),
        case("silu_mul", silu_mul_kernel, silu, {"num_warps": 4, **STRICT}),
        case("rotate_and_store", rotate_and_store_kernel, {**rotation, "HAS_NORM": False}, turn),
        case("norm_rotate_store", rotate_and_store_kernel, {**rotation, "HAS_NORM": True}, turn),
    ]


_OWN_STRIDES: Final = ("x_stride", "residual_stride", "weight_stride", "norm_stride")

#: Run-time arguments that are not of the model's dtype.
_TYPES: Final = {
    **dict.fromkeys((*_OWN_STRIDES, "stride", "out_stride"), "i32"),
    **dict.fromkeys(("positions", "slots"), "*i32"),
    "eps": "fp32",
}
