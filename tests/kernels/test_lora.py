"""LoRA over paged weights: the reference against dense math, the CPU path against the reference."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels import cpu, reference
from loraplex_kernels.batch import PagedAdapter, build_lora_batch
from loraplex_kernels.native import load_native
from loraplex_memory.layout import PROJECTIONS, SITES, ModelGeometry, PoolLayout
from tests.support.kernel_cases import ODD, SMOLLM2, LoRACase, PageWriter, make_lora_case

MIXED = [[8, 0, 3, 16, 1, 64, 200], [200, 8, 0, 0, 5, 0, 7]]


def uniform(rank: int) -> list[list[int]]:
    return [[rank] * 7, [rank] * 7]


POPULARITY = {
    "one row": [[5]],
    "identical": [list(range(12))],
    "distinct": [[i] for i in range(5)],
    "skewed": [[0, 2, 4, 6, 8, 10, 1, 3], [5], [11, 7]],
    "ragged prefill": [list(range(3, 40)), [0], [1, 2]],
}


def site_args(site: str, geometry: ModelGeometry) -> dict[str, tuple[int, ...]]:
    names = SITES[site]
    return {
        "projections": tuple(PROJECTIONS.index(n) for n in names),
        "out_features": tuple(geometry.out_features(n) for n in names),
    }


def dense_delta(case: LoRACase, rows, x, layer: int, site: str) -> torch.Tensor:
    geometry = case.pool.layout.geometry
    widths = [geometry.out_features(n) for n in SITES[site]]
    delta = torch.zeros(x.shape[0], sum(widths))
    for weights, segment in zip(case.weights, rows, strict=True):
        column = 0
        for name, width in zip(SITES[site], widths, strict=True):
            if (pair := weights.get((layer, name))) is not None:
                out = pair.scale * (x[segment].float() @ pair.a.T) @ pair.b.T
                delta[segment, column : column + width] = out
            column += width
    return delta


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("ranks", [1, 8, 16, 64, 200, "mixed"])
@pytest.mark.parametrize("site", SITES)
def test_delta_equals_dense_math(popularity, ranks, site):
    rows = POPULARITY[popularity]
    adapter_ranks = [MIXED if ranks == "mixed" else uniform(ranks) for _ in rows]
    case = make_lora_case(adapter_ranks, rows)
    num_tokens = max(map(max, rows)) + 3
    x = torch.randn(num_tokens, SMOLLM2.in_features(SITES[site][0]))
    for layer in (0, 1):
        expected = dense_delta(case, rows, x, layer, site)
        for add_lora in (reference.add_lora, cpu.add_lora):
            y = torch.randn(num_tokens, expected.shape[1])
            before = y.clone()
            pages = case.pool.layer(layer)
            add_lora(y, x, pages, case.batch, layer=layer, **site_args(site, SMOLLM2))
            torch.testing.assert_close(y - before, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("geometry", [SMOLLM2, ODD], ids=["SmolLM2", "odd sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_scattered", [True, False], ids=["scattered", "contiguous"])
def test_cpu_path_agrees_with_the_reference(geometry, dtype, is_scattered):
    rows = POPULARITY["skewed"]
    case = make_lora_case(
        [MIXED, uniform(16), uniform(0)],
        rows,
        geometry=geometry,
        dtype=dtype,
        is_scattered=is_scattered,
    )
    x = torch.randn(14, geometry.hidden_size, dtype=dtype)
    args = site_args("qkv", geometry)
    mine = torch.randn(14, sum(args["out_features"])).to(dtype)
    theirs = mine.clone()
    cpu.add_lora(mine, x, case.pool.layer(0), case.batch, layer=0, **args)
    reference.add_lora(theirs, x, case.pool.layer(0), case.batch, layer=0, **args)
    # In bfloat16 the reference rounds the delta before it adds it, the kernel only the sum.
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_rows_without_an_adapter_are_untouched():
    rows = [[1], [3, 4]]
    case = make_lora_case([uniform(8), uniform(0)], rows)
    x, y = torch.randn(6, 576), torch.randn(6, 960)
    before = y.clone()
    cpu.add_lora(y, x, case.pool.layer(0), case.batch, layer=0, **site_args("qkv", SMOLLM2))
    changed = (y != before).any(dim=1).tolist()
    assert changed == [False, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_delta_is_bit_identical_in_any_company(dtype):
    if load_native() is None:
        pytest.skip("no C compiler: torch's matrix product picks its order by size")
    x = torch.randn(9, 576).to(dtype)
    base = torch.randn(9, 960).to(dtype)
    outcomes = []
    for rows in ([[4]], [[0, 4]], [[1, 2, 3, 4, 5]], [list(range(9))]):
        case = make_lora_case([MIXED], rows, dtype=dtype)
        y = base.clone()
        cpu.add_lora(y, x, case.pool.layer(0), case.batch, layer=0, **site_args("qkv", SMOLLM2))
        outcomes.append(y[4])
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_no_adapter_in_the_step_means_no_batch():
    assert make_lora_case([], []).batch is None


def make_epilogue_batch(layout, pool, rows):
    """Return a batch of one adapter with a pair, a scale and a bias on o."""
    generator = torch.Generator().manual_seed(0)
    width = layout.geometry.hidden_size
    matrices = [torch.randn(n, width, generator=generator) for n in (5, 5, 2, 1)]
    writer = PageWriter(layout)
    chunks = [writer.add(matrix) for matrix in matrices]
    pages = writer.write(pool, list(range(pool.shape[0])))
    absent = [-1] * 3
    tables = [[[*absent, chunk, *absent]] for chunk in chunks]
    adapter = PagedAdapter(pages, [[0, 0, 0, 5, 0, 0, 0]], *tables)
    return matrices, build_lora_batch([adapter], rows, layout.chunk_elems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", [SMOLLM2, ODD], ids=["SmolLM2", "odd sizes"])
def test_a_row_with_scale_and_bias_is_bit_identical_in_any_company(geometry, dtype):
    if load_native() is None:
        pytest.skip("no C compiler: torch's matrix product picks its order by size")
    layout = PoolLayout(geometry)
    width = geometry.hidden_size
    x, base = torch.randn(9, width).to(dtype), torch.randn(9, width).to(dtype)
    outcomes = []
    for rows in ([[4]], [[0, 4]], [[1, 2, 3, 4, 5]], [list(range(9))]):
        pool = torch.full((9, layout.page_elems), torch.nan).to(dtype)
        matrices, batch = make_epilogue_batch(layout, pool, rows)
        y = base.clone()
        cpu.add_lora(y, x, pool, batch, layer=0, **site_args("o", geometry))
        outcomes.append(y[4])
        others = [row for row in range(9) if row not in rows[0]]
        assert torch.equal(y[others], base[others])
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])
    a, b, scale, bias = (m.to(dtype).float() for m in matrices)
    expected = scale.sum(0) * (base[4].float() + (x[4].float() @ a.T) @ b) + bias[0]
    slack = 1e-3 if dtype is torch.float32 else 1e-1
    torch.testing.assert_close(outcomes[0].float(), expected, atol=slack, rtol=slack / 4)


@pytest.mark.parametrize("add_lora", [reference.add_lora, cpu.add_lora])
def test_scale_and_bias_apply_after_the_delta(add_lora):
    layout = PoolLayout(ODD)
    pool = torch.full((9, layout.page_elems), torch.nan)
    writer = PageWriter(layout)
    a, b, scale, bias = (torch.randn(n, 40) for n in (3, 3, 2, 1))
    chunks = [writer.add(matrix) for matrix in (a, b, scale, bias)]
    pages = writer.write(pool, [7, 2, 5])
    absent = [-1] * 6
    tables = [[[chunk, *absent]] for chunk in chunks]
    both = PagedAdapter(pages, [[3] + [0] * 6], *tables)
    bias_only = PagedAdapter(pages, [[0] * 7], [[0] * 7], [[0] * 7], None, tables[3])
    neither = PagedAdapter(pages, [[3] + [0] * 6], *tables[:2])
    batch = build_lora_batch([both, bias_only, neither], [[0], [3], [1]], layout.chunk_elems)
    x, y = torch.randn(4, 40), torch.randn(4, 40)
    expected = y.clone()
    delta = (x @ a.T) @ b
    expected[0] = scale.sum(0) * (y[0] + delta[0]) + bias[0]
    expected[3] += bias[0]
    expected[1] += delta[1]
    add_lora(y, x, pool, batch, layer=0, projections=(0,), out_features=(40,))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
