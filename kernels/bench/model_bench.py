"""Attention and elementwise kernels on a device, as shares of what it can do.

Decode attention is bound by the bytes of K and V, prefill attention by its matrix products,
elementwise kernels by the bytes of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from device_clock import DeviceClock, Work, num_copies
from device_limits import DeviceLimits

from loraplex_kernels.batch import AttentionBatch, build_attention_batch
from loraplex_kernels.model_tables import KernelModel, RopeTable, StepCapacity
from loraplex_kernels.ops import StepOps, device_backend
from loraplex_memory.layout import ModelGeometry, PoolLayout


@dataclass(frozen=True)
class KernelResult:
    """One launch: its time, and its share of the ceiling that bounds it.

    Attributes:
        bound: "bytes" or "flops".
        amount: bytes or floating point operations that it must move or do.
        share: of the copy bandwidth or of the matrix rate.
    """

    case: str
    us: float
    bound: str
    amount: int
    share: float


class KernelBench:
    """One geometry's kernels over random activations and pages."""

    def __init__(
        self, model: str, geometry: ModelGeometry, clock: DeviceClock, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._geometry = geometry
        self._clock = clock
        self._dtype = dtype
        self._layout = PoolLayout(geometry)

    def decode_attention(
        self, limits: DeviceLimits, batch: int, context: int
    ) -> list[KernelResult]:
        """`batch` sequences of one query each over `context` tokens."""
        num_bytes = batch * context * self._geometry.kv_elems_per_token * self._dtype.itemsize
        us = self._time_attention([(context - 1, 1)] * batch, num_bytes)
        share = num_bytes / us / limits.bytes_per_us
        name = f"{self._model} decode attention, {batch} x {context} tokens"
        return [KernelResult(name, us, "bytes", num_bytes, share)]

    def prefill_attention(self, limits: DeviceLimits, num_tokens: int) -> list[KernelResult]:
        """One prompt at once, causal: half of the score matrix is computed."""
        heads = self._geometry.num_heads * self._geometry.head_dim
        flops = 2 * num_tokens * num_tokens * heads
        num_bytes = num_tokens * self._geometry.kv_elems_per_token * self._dtype.itemsize
        us = self._time_attention([(0, num_tokens)], num_bytes)
        share = flops / us / 1e6 / limits.gemm_tflop_s
        name = f"{self._model} prefill attention, {num_tokens} tokens"
        return [KernelResult(name, us, "flops", flops, share)]

    def elementwise(self, limits: DeviceLimits, num_tokens: int) -> Iterator[KernelResult]:
        """Norm with residual, gated product, and rotation with the write of K and V."""
        g = self._geometry
        heads = g.num_heads + 2 * g.num_kv_heads
        for name, width, make in (
            ("add_rms_norm", 4 * g.hidden_size, self._norm_calls),
            ("silu_mul", 3 * g.intermediate_size, self._silu_calls),
            ("rotate_and_store", 2 * heads * g.head_dim, self._rotate_calls),
        ):
            num_bytes = num_tokens * width * self._dtype.itemsize
            copies = num_copies(num_bytes, most=64) if self._clock.is_cuda else 1
            calls = make(self._decode_ops(num_tokens), num_tokens, copies)
            us = self._clock.compare_us({name: calls})[name]
            share = num_bytes / us / limits.bytes_per_us
            case = f"{self._model} {name}, {num_tokens} tokens"
            yield KernelResult(case, us, "bytes", num_bytes, share)

    def _time_attention(self, spans: list[tuple[int, int]], num_bytes: int) -> float:
        page_tokens = self._layout.page_tokens
        pages_each = -(-sum(spans[0]) // page_tokens)
        num_pages = pages_each * len(spans)
        pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
        tables = [pages[s * pages_each : (s + 1) * pages_each] for s in range(len(spans))]
        batch = build_attention_batch(spans, tables, page_tokens)
        num_rows = sum(count for _, count in spans)
        ops = self._ops(batch, StepCapacity(num_rows, len(spans), num_pages))
        copies = num_copies(num_bytes, most=64) if self._clock.is_cuda else 1
        g = self._geometry
        kv = self._random(copies, num_pages, 2, page_tokens, g.num_kv_heads, g.head_dim)
        query = self._random(num_rows, g.num_heads, g.head_dim)
        scale = g.head_dim**-0.5

        def call(copy: int) -> Work:
            return lambda: ops.attend(query, kv[copy], scale=scale, window=None)

        calls = [call(copy) for copy in range(copies)]
        return self._clock.compare_us({"attention": calls})["attention"]

    def _norm_calls(self, ops: StepOps, num_tokens: int, copies: int) -> list[Work]:
        width = self._geometry.hidden_size
        x, residual = (self._random(copies, num_tokens, width) for _ in range(2))
        weight = self._random(width)
        return _each(copies, lambda i: ops.add_rms_norm(x[i], residual[i], weight, 1e-5))

    def _silu_calls(self, ops: StepOps, num_tokens: int, copies: int) -> list[Work]:
        gate_up = self._random(copies, num_tokens, 2 * self._geometry.intermediate_size)
        return _each(copies, lambda i: ops.silu_mul(gate_up[i]))

    def _rotate_calls(self, ops: StepOps, num_tokens: int, copies: int) -> list[Work]:
        g, page_tokens = self._geometry, self._layout.page_tokens
        qkv = self._random(copies, num_tokens, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim)
        kv = self._random(num_tokens, 2, page_tokens, g.num_kv_heads, g.head_dim)
        rope = RopeTable(self._random(16, g.head_dim), self._random(16, g.head_dim))
        return _each(copies, lambda i: ops.rotate_and_store(qkv[i], kv, rope, None, 1e-5))

    def _decode_ops(self, num_tokens: int) -> StepOps:
        spans, tables = [(0, 1)] * num_tokens, [[page] for page in range(num_tokens)]
        batch = build_attention_batch(spans, tables, self._layout.page_tokens)
        return self._ops(batch, StepCapacity(num_tokens, num_tokens, num_tokens, plane_elems=16))

    def _ops(self, batch: AttentionBatch, capacity: StepCapacity) -> StepOps:
        g = self._geometry
        model = KernelModel(
            num_layers=1,
            num_heads=g.num_heads,
            num_kv_heads=g.num_kv_heads,
            head_dim=g.head_dim,
            page_tokens=self._layout.page_tokens,
            page_elems=self._layout.page_elems,
            chunk_elems=self._layout.chunk_elems,
            sites=(),
            dtype=self._dtype,
        )
        return device_backend(model, capacity, self._clock.device).prepare(batch, None)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._clock.device).normal_()


def _each(copies: int, work: Callable[[int], object]) -> list[Work]:
    return [lambda i=i: work(i) for i in range(copies)]
