"""Paged attention: the reference against dense math, the CPU path against the reference."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from loraplex_kernels import cpu, native, reference
from loraplex_kernels.batch import build_attention_batch

PAGE = 16


def make_case(spans, *, heads=9, kv_heads=3, dim=64, dtype=torch.float32, seed=0, page=PAGE):
    """Return (batch, kv pages, queries, per-sequence dense K and V)."""
    torch.manual_seed(seed)
    free = list(range(sum(-(-(s + n) // page) for s, n in spans) + 2))
    random.Random(seed).shuffle(free)
    tables = [[free.pop() for _ in range(-(-(s + n) // page))] for s, n in spans]
    kv = torch.full(
        (len(free) + sum(map(len, tables)), 2, page, kv_heads, dim), torch.nan, dtype=dtype
    )
    batch = build_attention_batch(spans, tables, page)
    dense = []
    for (start, count), table in zip(spans, tables, strict=True):
        key, value = torch.randn(2, start + count, kv_heads, dim).to(dtype)
        for t in range(start):
            kv[table[t // page], 0, t % page] = key[t]
            kv[table[t // page], 1, t % page] = value[t]
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


#: Contexts over several blocks of 128 keys of the CPU kernel, and decodes enough that it takes all
#: KV heads of a sequence together.
LONG_SPANS = {
    "long decodes": [(127, 1), (128, 1), (300, 1), (1000, 1)],
    "long chunks": [(120, 40), (250, 17), (0, 270)],
    "many decodes": [(13 * i, 1) for i in range(20)],
    "many of both": [
        *((37 * i, 1) for i in range(9)),
        (5, 70),
        *((i, 3) for i in range(9)),
        (0, 9),
    ],
}


@pytest.mark.parametrize("spans", LONG_SPANS.values(), ids=LONG_SPANS)
@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize("page", [1, 4, 24])
def test_long_contexts_equal_dense_math(spans, window, page):
    batch, kv, query, dense = make_case(spans, page=page)
    expected = dense_attention(query, dense, spans, 0.2, window)
    out = cpu.paged_attention(query, kv, batch, scale=0.2, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 48, 80, 96, 256])
@pytest.mark.parametrize("groups", [1, 2, 5, 7, 8, 13, 64])
def test_any_head_equals_dense_math(dtype, dim, groups):
    spans = [(140, 1), (0, 3), (150, 9)]
    case = make_case(spans, heads=2 * groups, kv_heads=2, dim=dim, dtype=dtype)
    batch, kv, query, dense = case
    expected = dense_attention(query, dense, spans, 0.2, None)
    # float32 queries, as the fused projection gives them: only the result is rounded.
    out = cpu.paged_attention(query.float(), kv, batch, scale=0.2)
    torch.testing.assert_close(
        out.float(), expected, rtol=1e-4 if dtype is torch.float32 else 6e-3, atol=1e-5
    )


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


@pytest.mark.parametrize("window", [None, 8, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_gets_the_same_bits_in_any_company_and_any_chunk(window, dtype):
    if native.load_native() is None:
        pytest.skip("no C compiler: torch's kernels pick their order by size")
    spans = [(46, 1), (0, 50), (7, 40), (250, 20)]
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


@pytest.mark.parametrize("half", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("window", [None, 30])
def test_a_nan_reaches_those_who_see_it_and_no_others(half, window):
    if native.load_native() is None:
        pytest.skip("no C compiler: torch multiplies masked values by 0")
    spans, bad = [(100, 80)], 133
    batch, kv, query, _ = make_case(spans)
    kv[batch.block_tables[0, bad // PAGE], half, bad % PAGE] = torch.nan
    out = cpu.paged_attention(query, kv, batch, scale=0.2, window=window)
    last = bad + (window or 10**9)
    for position, row in enumerate(out, start=100):
        assert row.isnan().all() if bad <= position < last else row.isfinite().all(), position


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
