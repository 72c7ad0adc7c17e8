"""Checks of the attention kernels against their torch reference, on any device.

Inputs and expectations are made on the host. Every page slot that no sequence owns holds NaN, and
so do scratch and output before a launch: a kernel that reads or leaves out a row too many shows it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from loraplex_kernels import reference
from loraplex_kernels.attention_launch import DecodeScratch, decode_attention, prefill_attention
from loraplex_kernels.attention_work import AttentionTables, AttentionTiling, build_attention_work
from loraplex_kernels.batch import AttentionBatch, build_attention_batch

Spans = Sequence[tuple[int, int]]

SCALE = 0.2

MIXED = ((0, 1), (15, 1), (16, 1), (100, 1), (0, 5), (30, 50))


@dataclass(frozen=True)
class AttentionCase:
    """A step over scattered pages, on the host: its K and V are in their pages already."""

    batch: AttentionBatch
    kv: torch.Tensor
    query: torch.Tensor

    def expected(self, *, window: int | None = None, scale: float = SCALE) -> torch.Tensor:
        return reference.paged_attention(
            self.query.float(), self.kv.float(), self.batch, scale=scale, window=window
        )


def make_attention_case(
    spans: Spans,
    *,
    heads: int = 9,
    kv_heads: int = 3,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    page_tokens: int = 16,
) -> AttentionCase:
    """Return a case whose sequence `s` has the same K, V and queries by position in any spans."""
    counts = [-(-(start + count) // page_tokens) for start, count in spans]
    pages = list(range(sum(counts) + 2))
    random.Random(len(pages)).shuffle(pages)
    tables = [[pages.pop() for _ in range(count)] for count in counts]
    shape = (sum(counts) + 2, 2, page_tokens, kv_heads, dim)
    kv = torch.full(shape, torch.nan, dtype=dtype)
    queries = []
    for s, ((start, count), table) in enumerate(zip(spans, tables, strict=True)):
        generator = torch.Generator().manual_seed(s)
        for position in range(start + count):
            token = torch.randn(2 * kv_heads + heads, dim, generator=generator).to(dtype)
            slot = kv[table[position // page_tokens], :, position % page_tokens]
            slot.copy_(token[: 2 * kv_heads].view(2, kv_heads, dim))
            if position >= start:
                queries.append(token[2 * kv_heads :])
    return AttentionCase(
        build_attention_batch(spans, tables, page_tokens), kv, torch.stack(queries)
    )


def tiling_of(case: AttentionCase, split_tokens: int = 64) -> AttentionTiling:
    return AttentionTiling.of(
        case.query.shape[1],
        case.kv.shape[3],
        case.kv.shape[4],
        elem_bytes=case.kv.element_size(),
        split_tokens=split_tokens,
    )


def tables_of(
    case: AttentionCase, tiling: AttentionTiling, device: torch.device
) -> AttentionTables:
    work = build_attention_work(case.batch, page_tokens=case.kv.shape[2], tiling=tiling)
    return work.to(device)


def attend(
    case: AttentionCase,
    device: torch.device,
    *,
    window: int | None = None,
    scale: float = SCALE,
    split_tokens: int = 64,
    num_programs: int = 5,
) -> torch.Tensor:
    """Run the kernels on `device` and return the output on the host."""
    tiling = tiling_of(case, split_tokens)
    tables = tables_of(case, tiling, device)
    query, kv = case.query.to(device), case.kv.to(device)
    out = torch.full_like(query, torch.nan)
    common = {"scale": scale, "tiling": tiling, "out": out, "window": window}
    scratch = nan_scratch(len(tables.decode_items), query)
    decode_attention(query, kv, tables, scratch, num_programs=num_programs, **common)
    prefill_attention(query, kv, tables, **common)
    return out.cpu()


def nan_scratch(num_items: int, query: torch.Tensor) -> DecodeScratch:
    scratch = DecodeScratch.allocate(num_items, query.shape[1], query.shape[2], query.device)
    scratch.partial.fill_(torch.nan)
    scratch.stats.fill_(torch.nan)
    return scratch


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare within float32 rounding, or the rounding of the weights in half precision."""
    tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def agrees(
    device: torch.device,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None = None,
    spans: Spans = MIXED,
) -> None:
    case = make_attention_case(spans, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    assert_near(attend(case, device, window=window), case.expected(window=window))


def pages_of_any_size_hold_the_same(device: torch.device) -> None:
    spans = ((40, 1), (70, 33))
    expected = make_attention_case(spans, heads=8, kv_heads=2, dim=16).expected()
    for page_tokens in (1, 8, 24, 128):
        case = make_attention_case(spans, heads=8, kv_heads=2, dim=16, page_tokens=page_tokens)
        assert_near(attend(case, device), expected)


def pages_lie_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """4 GiB, of which a CPU maps only what is written."""
    case = make_attention_case(
        ((40, 1), (20, 30)), heads=4, kv_heads=1, dim=32, dtype=torch.bfloat16
    )
    first = 2**31 // case.kv[0].numel() + 1
    kv = torch.empty(first + len(case.kv), *case.kv.shape[1:], dtype=case.kv.dtype, device=device)
    kv[first:] = case.kv.to(device)
    batch = dataclasses.replace(case.batch, block_tables=case.batch.block_tables + first)
    assert_near(attend(AttentionCase(batch, kv, case.query), device), case.expected())


def many_splits_are_merged(device: torch.device) -> None:
    case = make_attention_case(((330, 1), (127, 1), (128, 1), (15, 1)), heads=2, kv_heads=1, dim=32)
    for window in (None, 40, 130):
        out = attend(case, device, window=window, split_tokens=16)
        assert_near(out, case.expected(window=window))


def large_scores_do_not_overflow(device: torch.device) -> None:
    case = make_attention_case(((70, 1), (20, 30)), heads=2, kv_heads=1)
    out = attend(case, device, scale=30.0)
    torch.testing.assert_close(out, case.expected(scale=30.0), rtol=1e-3, atol=1e-3)


def a_window_may_end_anywhere_in_a_block(device: torch.device) -> None:
    case = make_attention_case(((130, 1), (20, 80)), heads=2, kv_heads=1, dim=16)
    for window in (1, 31, 32, 33, 63, 64, 1000):
        assert_near(attend(case, device, window=window), case.expected(window=window))


def a_query_has_the_same_bits_in_any_company(device: torch.device) -> None:
    spans = ((140, 1), (0, 1), (63, 1), (0, 50), (7, 40))
    for dtype, window in ((torch.float32, None), (torch.bfloat16, 40)):
        case = make_attention_case(spans, heads=4, kv_heads=1, dim=32, dtype=dtype)
        together = attend(case, device, window=window, num_programs=3)
        row = 0
        for s, (start, count) in enumerate(spans):
            rows = slice(row, row + count)
            alone = attend(only(case, s, start, count, rows), device, window=window)
            assert torch.equal(alone, together[rows])
            row += count


def a_query_has_the_same_bits_in_any_chunk(device: torch.device) -> None:
    for dtype, window in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 40)):
        whole = make_attention_case(((0, 150),), heads=3, kv_heads=1, dim=32, dtype=dtype)
        expected = attend(whole, device, window=window)
        for borders in ((0, 64, 150), (0, 3, 40, 103, 106, 150)):
            for start, stop in pairwise(borders):
                chunk = only(whole, 0, start, stop - start, slice(start, stop))
                assert torch.equal(attend(chunk, device, window=window), expected[start:stop])


def only(case: AttentionCase, s: int, start: int, count: int, rows: slice) -> AttentionCase:
    """Return tokens `[start, start + count)` of one sequence as a step of their own."""
    page_tokens = case.kv.shape[2]
    table = case.batch.block_tables[s, : -(-(start + count) // page_tokens)].tolist()
    batch = build_attention_batch([(start, count)], [table], page_tokens)
    return AttentionCase(batch, case.kv, case.query[rows])


def a_nan_reaches_its_own_sequence_only(device: torch.device) -> None:
    case = make_attention_case(((40, 1), (90, 1), (33, 1), (0, 20)))
    case.kv[case.batch.block_tables[1, 2], 0, 5] = torch.nan
    poisoned = attend(case, device).isnan().flatten(1).any(1)
    assert poisoned.tolist() == [row == 1 for row in range(23)]


def rows_may_be_strided(device: torch.device) -> None:
    case = make_attention_case(((70, 1), (3, 1), (20, 30)))
    tiling = tiling_of(case)
    tables = tables_of(case, tiling, device)
    rows, heads, dim = case.query.shape
    wide = torch.full((rows, heads + 6, dim), torch.nan, dtype=case.query.dtype, device=device)
    query, out = wide[:, :heads], torch.full_like(wide, 7.0)
    query.copy_(case.query)
    common = {"scale": SCALE, "tiling": tiling, "out": out[:, 3 : heads + 3]}
    kv = case.kv.to(device)
    scratch = nan_scratch(len(tables.decode_items), query)
    decode_attention(query, kv, tables, scratch, num_programs=5, **common)
    prefill_attention(query, kv, tables, **common)
    assert_near(out[:, 3 : heads + 3].cpu(), case.expected())
    assert bool((out[:, :3] == 7).all())
    assert bool((out[:, heads + 3 :] == 7).all())


def stale_tables_serve_a_smaller_step(device: torch.device) -> None:
    """A large step, then smaller ones over what it left; on a GPU through one CUDA graph."""
    steps = [
        ((70, 1), (3, 1), (140, 1), (64, 1), (63, 1)),
        ((80, 1), (2, 1)),
        ((129, 1),),
        ((0, 1), (1, 1), (2, 1), (3, 1)),
    ]
    cases = [make_attention_case(spans, heads=4, kv_heads=1) for spans in steps]
    num_pages = max(len(case.kv) for case in cases)
    tiling = tiling_of(cases[0])
    tables = tables_of(cases[0], tiling, device)
    query, out = (torch.zeros_like(cases[0].query, device=device) for _ in range(2))
    kv = cases[0].kv.new_empty(num_pages, *cases[0].kv.shape[1:]).to(device)
    scratch = nan_scratch(len(tables.decode_items), query)
    launch = partial(
        decode_attention,
        query, kv, tables, scratch, scale=SCALE, tiling=tiling, num_programs=5, out=out,
    )  # fmt: skip
    replay = captured(launch, device)
    for case in cases:
        rows = len(case.query)
        kv[: len(case.kv)] = case.kv.to(device)
        query[:rows] = case.query.to(device)
        for field in dataclasses.fields(AttentionTables):
            new = getattr(tables_of(case, tiling, device), field.name)
            getattr(tables, field.name).view(-1)[: new.numel()] = new.view(-1)
        out.fill_(torch.nan)
        replay()
        assert_near(out[:rows].cpu(), case.expected())
        assert bool(out[rows:].isnan().all())


def captured(launch: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a replay of `launch` from a CUDA graph, or `launch` itself on a CPU."""
    if device.type != "cuda":
        return launch
    launch()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def _name(check: Callable[[torch.device], None]) -> str:
    if not isinstance(check, partial):
        return check.__name__
    k = check.keywords
    dtype, window = str(k["dtype"]).removeprefix("torch."), k.get("window")
    name = f"agrees {k['heads']}/{k['kv_heads']}x{k['dim']} {dtype}"
    return name if window is None else f"{name} window {window}"


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16

ATTENTION_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    (_name(check), check)
    for check in (
        partial(agrees, heads=9, kv_heads=3, dim=64, dtype=_F32),
        partial(agrees, heads=9, kv_heads=3, dim=64, dtype=_BF16, window=24),
        partial(agrees, heads=9, kv_heads=3, dim=64, dtype=_F16),
        partial(agrees, heads=4, kv_heads=4, dim=20, dtype=_F32, window=24),
        partial(agrees, heads=4, kv_heads=4, dim=20, dtype=_BF16),
        partial(agrees, heads=8, kv_heads=1, dim=96, dtype=_F32, window=70),
        partial(agrees, heads=8, kv_heads=1, dim=96, dtype=_BF16),
        partial(agrees, heads=40, kv_heads=2, dim=80, dtype=_BF16, spans=((40, 1), (30, 9))),
        partial(agrees, heads=71, kv_heads=1, dim=64, dtype=_BF16, spans=((40, 1), (0, 3))),
        partial(agrees, heads=8, kv_heads=2, dim=128, dtype=_F32),
        partial(agrees, heads=8, kv_heads=2, dim=128, dtype=_BF16, window=70),
        partial(agrees, heads=32, kv_heads=8, dim=128, dtype=_BF16, spans=((70, 1), (17, 20))),
        partial(agrees, heads=2, kv_heads=1, dim=256, dtype=_BF16),
        partial(agrees, heads=2, kv_heads=1, dim=256, dtype=_F32, window=24),
        pages_of_any_size_hold_the_same,
        pages_lie_beyond_2_to_the_31_elements,
        many_splits_are_merged,
        large_scores_do_not_overflow,
        a_window_may_end_anywhere_in_a_block,
        a_query_has_the_same_bits_in_any_company,
        a_query_has_the_same_bits_in_any_chunk,
        a_nan_reaches_its_own_sequence_only,
        rows_may_be_strided,
        stale_tables_serve_a_smaller_step,
    )
]
