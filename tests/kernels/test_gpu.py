"""The GPU path's tables: which steps they hold. What it computes is checked through the engine."""

from __future__ import annotations

import torch

from loraplex_kernels.batch import build_attention_batch
from loraplex_kernels.gpu import GpuBackend
from loraplex_kernels.model_tables import KernelModel, StepCapacity

PAGE = 16


def make_backend(capacity):
    model = KernelModel(
        num_layers=1,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        page_tokens=PAGE,
        page_elems=2 * PAGE * 16,
        chunk_elems=16,
        sites=(),
        dtype=torch.bfloat16,
    )
    return GpuBackend(model, capacity, torch.device("cpu"))


def test_the_static_tables_hold_short_spans_that_all_cross_a_tile():
    spans = [(start, 2) for start in range(15, 15 + 8 * 16, 16)]
    tables = [[0] * (-(-(start + 2) // PAGE)) for start, _ in spans]
    num_pages = sum(map(len, tables))
    backend = make_backend(StepCapacity(16, len(spans), num_pages))
    batch = build_attention_batch(spans, tables, PAGE)
    first, second = (backend.prepare(batch, None).attention for _ in range(2))
    assert len(first.prefill_items) == 2 * len(spans)
    assert first.prefill_items.data_ptr() == second.prefill_items.data_ptr()


def test_a_step_that_outgrows_the_static_tables_brings_its_own():
    backend = make_backend(StepCapacity(16, 2, 2))
    small = build_attention_batch([(3, 1), (4, 1)], [[1], [0]], PAGE)
    large = build_attention_batch([(30, 1), (4, 1)], [[1, 2], [0]], PAGE)
    assert backend.fill(small, None, 2)
    assert not backend.fill(large, None, 2)
    held = backend.static_ops(2, has_lora=False).attention
    brought = backend.prepare(large, None).attention
    assert brought.pages.tolist() == [1, 2, 0]
    assert brought.pages.data_ptr() != held.pages.data_ptr()
    assert held.context_lens.tolist() == [4, 5]
