"""Toy kernels for the compile harness: a good one, and one for each thing it must catch."""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_kernels.aot import AotCase, ModelShape


@triton.jit
def _sum_kernel(pool, pages, out, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum_k pool[page_i, k]; a stride other than 1 keeps loads from being wide."""
    program = tl.program_id(0)
    page = tl.load(pages + program).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row = tl.load(pool + page * BLOCK * STRIDE + columns * STRIDE)
    tl.store(out + program, tl.sum(row.to(tl.float32)))


@triton.jit
def _dot_kernel(a, b, out, BLOCK: tl.constexpr, K: tl.constexpr):
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + inner[None, :])
    right = tl.load(b + inner[:, None] * BLOCK + rows[None, :])
    product = tl.dot(left, right)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], product)


def _sum_case(name: str, stride: int) -> AotCase:
    return AotCase(
        name,
        _sum_kernel,
        {"pool": "*bf16", "pages": "*i32", "out": "*fp32"},
        {"STRIDE": stride, "BLOCK": 4096},
        must_vectorise=("pool",),
    )


def _dot_case(name: str, block: int, k: int, num_warps: int) -> AotCase:
    return AotCase(
        name,
        _dot_kernel,
        {"a": "*bf16", "b": "*bf16", "out": "*fp32"},
        {"BLOCK": block, "K": k},
        num_warps=num_warps,
    )


def aot_cases(shape: ModelShape) -> list[AotCase]:
    """Return the toys; they depend on no model."""
    return [
        _sum_case("good", 1),
        _sum_case("narrow", 2),
        _dot_case("spilling", 128, 64, num_warps=1),
        _dot_case("large", 64, 1024, num_warps=8),
        AotCase(
            "not-built",
            _dot_kernel,
            {"a": "*bf16", "b": "*fp32", "out": "*fp32"},
            {"BLOCK": 16, "K": 16},
        ),
    ]
