"""Paged attention: the reference against dense math, the CPU path against the reference."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from loraplex_kernels import cpu, native, reference
from loraplex_kernels.batch import build_attention_batch

PAGE = 16


def make_case(spans, *, heads=9, kv_heads=3, dim=64, dtype=torch.float32, seed=0):
    """Return (batch, kv pages, queries, per-sequence dense K and V)."""
    torch.manual_seed(seed)
    free = list(range(sum(-(-(s + n) // PAGE) for s, n in spans) + 2))
    random.Random(seed).shuffle(free)
    tables = [[free.pop() for _ in range(-(-(s + n) // PAGE))] for s, n in spans]
    kv = torch.full(
        (len(free) + sum(map(len, tables)), 2, PAGE, kv_heads, dim), torch.nan, dtype=dtype
    )
    batch = build_attention_batch(spans, tables, PAGE)
    dense = []
    for (start, count), table in zip(spans, tables, strict=True):
        key, value = torch.randn(2, start + count, kv_heads, dim).to(dtype)
        for t in range(start):
            kv[table[t // PAGE], 0, t % PAGE] = key[t]
            kv[table[t // PAGE], 1, t % PAGE] = value[t]
        dense.append((key, value))
    new = [torch.cat([d[i][s:] for d, (s, _) in zip(dense, spans, strict=True)]) for i in (0, 1)]
    reference.write_kv(kv, new[0], new[1], batch)
    query = torch.randn(sum(n for _, n in spans), heads, dim).to(dtype)
    return batch, kv, query, dense


def dense_attention(query, dense, spans, scale, window):
    out, row = [], 0
    for (key, value), (start, count) in zip(dense, spans, strict=True):
        groups = query.shape[1] // key.shape[1]
        q = query[row : row + count].float().transpose(0, 1)
        k, v = (t.float().repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
        i = torch.arange(start, start + count)[:, None]
        j = torch.arange(start + count)[None]
        mask = (j <= i) & (j > i - (window or 10**9))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
        row += count
    return torch.cat([o.transpose(0, 1) for o in out])


SPANS = {
    "one token": [(0, 1)],
    "decodes": [(0, 1), (15, 1), (16, 1), (100, 1), (47, 1)],
    "whole prompts": [(0, 5), (0, 16), (0, 33)],
    "chunks": [(16, 16), (20, 3), (7, 40)],
    "mixed": [(63, 1), (3, 1), (0, 20), (30, 17)],
}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 20), (8, 1, 128), (40, 2, 32)], ids=str
)
def test_attention_equals_dense_math(spans, window, heads, kv_heads, dim):
    batch, kv, query, dense = make_case(spans, heads=heads, kv_heads=kv_heads, dim=dim)
    expected = dense_attention(query, dense, spans, 0.2, window)
    for attention in (reference.paged_attention, cpu.paged_attention):
        out = attention(query, kv, batch, scale=0.2, window=window)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_within_its_rounding():
    batch, kv, query, dense = make_case(SPANS["mixed"], dtype=torch.bfloat16)
    expected = dense_attention(query, dense, SPANS["mixed"], 0.125, None)
    out = cpu.paged_attention(query, kv, batch, scale=0.125)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_large_scores_do_not_overflow():
    batch, kv, query, dense = make_case(SPANS["decodes"])
    expected = dense_attention(query, dense, SPANS["decodes"], 30.0, None)
    out = cpu.paged_attention(query, kv, batch, scale=30.0)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_gets_the_same_bits_in_any_company_and_any_chunk(window, dtype):
    if native.load_native() is None:
        pytest.skip("no C compiler: torch's kernels pick their order by size")
    spans = [(46, 1), (0, 50), (7, 40)]
    batch, kv, query, _ = make_case(spans, dtype=dtype)
    together = cpu.paged_attention(query, kv, batch, scale=0.2, window=window)
    row = 0
    for s, (start, count) in enumerate(spans):
        table = batch.block_tables[s, : -(-(start + count) // PAGE)].tolist()
        for i in range(count):  # each query as if it had been decoded alone
            alone = build_attention_batch([(start + i, 1)], [table], PAGE)
            out = cpu.paged_attention(query[row : row + 1], kv, alone, scale=0.2, window=window)
            assert torch.equal(out[0], together[row])
            row += 1


def test_a_nan_in_the_prefix_is_not_hidden():
    batch, kv, query, _ = make_case(SPANS["decodes"])
    kv[batch.block_tables[3, 2], 0, 5] = torch.nan
    out = cpu.paged_attention(query, kv, batch, scale=0.2)
    assert [bool(row.isnan().any()) for row in out] == [False, False, False, True, False]


def test_without_a_compiler_torch_takes_over(monkeypatch):
    monkeypatch.setattr(cpu, "load_native", lambda: None)
    batch, kv, query, dense = make_case(SPANS["mixed"])
    expected = dense_attention(query, dense, SPANS["mixed"], 0.2, None)
    out = cpu.paged_attention(query, kv, batch, scale=0.2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_missing_compiler_is_not_an_error(monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.load_native.__wrapped__() is None
    assert "no C compiler" in caplog.text
