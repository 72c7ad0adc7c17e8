"""LoRA in halves on the CPU: together the bits of `add_lora`, each alone the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex_kernels import cpu, reference
from loraplex_kernels.batch import PagedAdapter, build_lora_batch
from loraplex_kernels.cpu import CpuLoRAHalves
from loraplex_kernels.native import load_native
from loraplex_memory.layout import SITES, PoolLayout
from loraplex_server.model.transformer import lora_site
from tests.support.kernel_cases import ODD, SMALL, SMOLLM2, PageWriter, make_lora_case

MIXED = [[8, 0, 3, 16, 1, 64, 200], [200, 8, 0, 0, 5, 0, 7]]
EIGHT = [[8] * 7] * 2
ROWS = [list(range(3, 40)), [0], [41, 1]]

needs_compiler = pytest.mark.skipif(
    load_native() is None, reason="no C compiler: torch's matrix product picks its order by size"
)


def site_of(layout, name):
    return lora_site(name, layout.partition)


def activations(site, num_tokens, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, site.in_features, generator=generator)
    y = torch.randn(num_tokens, sum(site.out_features), generator=generator)
    return x.to(dtype), y.to(dtype)


def add_in_halves(y, x, pool, batch, layer, site):
    halves = CpuLoRAHalves(batch)
    planes = halves.shrink(x, pool, layer=layer, site=site)
    halves.expand(y, planes, pool, layer=layer, site=site)


def add_at_once(y, x, pool, batch, layer, site):
    projections, widths = site.projections, site.out_features
    cpu.add_lora(y, x, pool, batch, layer=layer, projections=projections, out_features=widths)


@needs_compiler
@pytest.mark.parametrize("geometry", [SMOLLM2, ODD], ids=["SmolLM2", "odd sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_halves_give_the_bits_of_the_whole(geometry, dtype):
    case = make_lora_case([MIXED, [[0] * 7] * 2, EIGHT], ROWS, geometry=geometry, dtype=dtype)
    batch = replace(case.batch, weights=torch.tensor([1.0, 2.0, -0.375]))
    for layer in (0, 1):
        for name in SITES:
            site = site_of(case.pool.layout, name)
            x, whole = activations(site, 43, dtype)
            before, halved = whole.clone(), whole.clone()
            add_at_once(whole, x, case.pool.layer(layer), batch, layer, site)
            add_in_halves(halved, x, case.pool.layer(layer), batch, layer, site)
            assert not torch.equal(whole, before)
            assert torch.equal(halved, whole)


@needs_compiler
def test_scales_and_biases_are_the_expands():
    layout = PoolLayout(ODD)
    pool = torch.full((9, layout.page_elems), torch.nan)
    writer = PageWriter(layout)
    chunks = [writer.add(torch.randn(n, 40)) for n in (3, 3, 2, 1)]
    pages, absent = writer.write(pool, [7, 2, 5]), [-1] * 3
    tables = [[[*absent, chunk, *absent]] for chunk in chunks]
    both = PagedAdapter(pages, [[0, 0, 0, 3, 0, 0, 0]], *tables)
    bias_only = PagedAdapter(pages, [[0] * 7], [[0] * 7], [[0] * 7], None, tables[3])
    batch = build_lora_batch([both, bias_only], [[0, 2], [3]], layout.chunk_elems)
    site = site_of(layout, "o")
    x, whole = activations(site, 5, torch.float32)
    halved = whole.clone()
    add_at_once(whole, x, pool, batch, 0, site)
    add_in_halves(halved, x, pool, batch, 0, site)
    assert torch.equal(halved, whole)


@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["small", "odd sizes"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_half_of_a_cut_adapter_agrees_with_the_reference(geometry, num_ranks):
    for rank in range(num_ranks):
        case = make_lora_case(
            [MIXED, EIGHT, EIGHT], ROWS, geometry=geometry, num_ranks=num_ranks, rank=rank
        )
        halves, pages = CpuLoRAHalves(case.batch), case.pool.layer(0)
        for name in SITES:
            site = site_of(case.pool.layout, name)
            x, mine = activations(site, 43, torch.float32)
            theirs = mine.clone()
            args = {"layer": 0, "projections": site.projections}
            expected = reference.shrink(x, pages, case.batch, **args)
            planes = halves.shrink(x, pages, layer=0, site=site)
            torch.testing.assert_close(planes, expected, rtol=1e-4, atol=1e-4)
            ranks = case.batch.ranks[0][:, list(site.projections)].sum(1)
            num_elems = sum(n * len(rows) for n, rows in zip(ranks.tolist(), ROWS, strict=True))
            whole = torch.randn(num_elems)
            halves.expand(mine, whole, pages, layer=0, site=site)
            reference.expand(
                theirs, whole, pages, case.batch, **args, out_features=site.out_features
            )
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)


@needs_compiler
def test_the_expand_writes_into_columns_of_a_wider_matrix():
    case = make_lora_case([EIGHT] * 3, ROWS, geometry=SMALL)
    site = site_of(case.pool.layout, "o")
    x, y = activations(site, 43, torch.float32)
    wide = torch.full((43, 200), torch.nan)
    wide[:, 64:160] = y
    add_in_halves(wide[:, 64:160], x, case.pool.layer(0), case.batch, 0, site)
    add_at_once(y, x, case.pool.layer(0), case.batch, 0, site)
    assert torch.equal(wide[:, 64:160], y)
    assert wide[:, :64].isnan().all()
    assert wide[:, 160:].isnan().all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bit_identical_in_any_company_in_each_half(dtype):
    outcomes = []
    for rows in ([[4]], [[0, 4]], [[1, 2, 3, 4, 5]], [list(range(40))]):
        case = make_lora_case([MIXED], rows, dtype=dtype)
        site = site_of(case.pool.layout, "qkv")
        x, y = activations(site, 40, dtype)
        halves, pages = CpuLoRAHalves(case.batch), case.pool.layer(0)
        planes = halves.shrink(x, pages, layer=0, site=site)
        halves.expand(y, planes, pages, layer=0, site=site)
        outcomes.append((planes.view(len(rows[0]), -1)[rows[0].index(4)], y[4]))
    for planes, y in outcomes[1:]:
        assert torch.equal(planes, outcomes[0][0])
        assert torch.equal(y, outcomes[0][1])
