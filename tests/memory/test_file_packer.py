"""Compiled packing gives the bits that torch's gives, and believes no file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraplex_kernels.native import PACKED_DTYPES, load_native
from loraplex_memory import file_packer
from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.errors import AdapterFileError
from loraplex_memory.file_packer import FilePacker
from loraplex_memory.host_pages import HostPages
from loraplex_memory.layout import ModelGeometry, PoolLayout
from tests.support.kernel_cases import make_weights

GEOMETRY = ModelGeometry(
    num_layers=3, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_size=600
)
POOL = PoolLayout(GEOMETRY, page_tokens=5)
MIXED = ((3, 0, 2, 1, 0, 4, 5), (0, 0, 0, 0, 0, 0, 2), (17, 16, 33, 1, 8, 64, 20))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture
def compiled():
    native = load_native()
    if native is None:
        pytest.skip("no C compiler")
    return native.pack


def weights_of(ranks, *, dtype=torch.bfloat16, seed=0, scale=0.3):
    made = make_weights(GEOMETRY, [list(row) for row in ranks], torch.Generator().manual_seed(seed))
    return AdapterWeights(
        {
            key: LoRAPair(pair.a.to(dtype), pair.b.to(dtype), scale + 0.1 * key[0])
            for key, pair in made.items()
        }
    )


def filled(packer, path, layout, dtype, order=None):
    """Return the pages `[N, L, page_elems]` of an adapter, in memory that held something else."""
    pages = order or [*range(layout.num_pages)][::-1]
    slab = torch.full((max(pages) + 2, 3, layout.pool.page_elems), float("nan"), dtype=dtype)
    packer.fill(HostPages(slab, pages), path, layout)
    others = [i for i in range(len(slab)) if i not in pages]
    assert slab[others].isnan().all(), "written outside of the adapter's pages"
    return slab[pages]


def same_bits(a, b):
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


@pytest.mark.parametrize("stored", PACKED_DTYPES)
@pytest.mark.parametrize("dtype", BITS)
def test_compiled_packing_gives_the_bits_of_torch(tmp_path, compiled, stored, dtype):
    path, layout = tmp_path / "a", AdapterLayout(POOL, AdapterSpec(MIXED))
    write_adapter_file(path, weights_of(MIXED, dtype=stored))
    expected = filled(FilePacker(dtype), path, layout, dtype)
    assert expected.count_nonzero() > 1000
    assert same_bits(filled(FilePacker(dtype, compiled), path, layout, dtype), expected)


#: Cut evenly; with sizes that do not divide, and ranks below their number; beyond the KV heads.
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", BITS)
def test_each_rank_gets_the_bits_of_its_part(tmp_path, compiled, dtype, num_ranks):
    pool = PoolLayout(GEOMETRY, page_tokens=5, num_ranks=num_ranks)
    path, layout = tmp_path / "a", AdapterLayout(pool, AdapterSpec(MIXED))
    parts = []
    for stored in PACKED_DTYPES:
        write_adapter_file(path, weights_of(MIXED, dtype=stored, scale=-0.15))
        for rank in range(num_ranks):
            expected = filled(FilePacker(dtype, rank=rank), path, layout, dtype)
            packed = filled(FilePacker(dtype, compiled, rank=rank), path, layout, dtype)
            assert same_bits(packed, expected)
            parts.append(packed)
    assert all(part.count_nonzero() > 100 for part in parts)
    assert all(not torch.equal(parts[0], part) for part in parts[1:])


@pytest.mark.parametrize("stored", PACKED_DTYPES)
@pytest.mark.parametrize("dtype", BITS)
def test_every_kind_of_number_is_rounded_as_torch_does(tmp_path, compiled, stored, dtype):
    """All 65,536 patterns of a 16-bit number; of float32 those, and ones on either side of ties."""
    high = torch.arange(1 << 16, dtype=torch.int32)
    if stored is torch.float32:
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        values = ((high[:, None] << 16) | low).flatten().view(torch.float32)
    else:
        values = high.to(torch.int16).view(stored)
    ranks = ((0, 0, 0, 0, 0, 64, 64), (0,) * 7, (0,) * 7)
    layout = AdapterLayout(POOL, AdapterSpec(ranks))
    weights = weights_of(ranks, dtype=stored, scale=3.0)
    for seed, matrix in enumerate(m for pair in weights.lora.values() for m in (pair.a, pair.b)):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        matrix.view(-1).copy_(values[order[: matrix.numel()] % len(values)].expand(-1))
    write_adapter_file(tmp_path / "a", weights)
    packed = filled(FilePacker(dtype, compiled), tmp_path / "a", layout, dtype)
    expected = filled(FilePacker(dtype), tmp_path / "a", layout, dtype)
    is_nan = expected.isnan()
    assert is_nan.any()
    assert torch.equal(packed.isnan(), is_nan)
    assert same_bits(packed[~is_nan], expected[~is_nan])


def test_adapters_of_one_header_are_planned_once_and_get_their_own_weights(
    tmp_path, compiled, monkeypatch
):
    layout, num_plans = AdapterLayout(POOL, AdapterSpec(MIXED)), []
    make_plan = file_packer._make_plan
    monkeypatch.setattr(
        file_packer, "_make_plan", lambda *args: num_plans.append(1) or make_plan(*args)
    )
    packer = FilePacker(torch.float32, compiled)
    for seed in (1, 2, 3):
        write_adapter_file(tmp_path / "a", weights_of(MIXED, seed=seed))
        packed = filled(packer, tmp_path / "a", layout, torch.float32)
        assert same_bits(
            packed, filled(FilePacker(torch.float32), tmp_path / "a", layout, torch.float32)
        )
    assert len(num_plans) == 1


def test_a_header_seen_before_is_not_believed_of_another_layout_or_a_file_cut_short(
    tmp_path, compiled
):
    path, layout = tmp_path / "a", AdapterLayout(POOL, AdapterSpec(MIXED))
    write_adapter_file(path, weights_of(MIXED))
    packer = FilePacker(torch.float32, compiled)
    filled(packer, path, layout, torch.float32)
    other = AdapterLayout(POOL, AdapterSpec((MIXED[1], MIXED[0], MIXED[2])))
    with pytest.raises(ValueError, match="modules"):
        filled(packer, path, other, torch.float32)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(AdapterFileError, match="truncated"):
        filled(packer, path, layout, torch.float32)


def test_no_more_headers_are_remembered_than_a_few(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(file_packer, "_MAX_PLANS", 2)
    packer = FilePacker(torch.float32, compiled)
    layout = AdapterLayout(POOL, AdapterSpec(MIXED))
    for scale in (1.0, 2.0, 3.0, 1.0):
        write_adapter_file(tmp_path / "a", weights_of(MIXED, scale=scale))
        packed = filled(packer, tmp_path / "a", layout, torch.float32)
        fresh = filled(FilePacker(torch.float32), tmp_path / "a", layout, torch.float32)
        assert same_bits(packed, fresh)
    assert len(packer._plans) == 2


@pytest.mark.parametrize("is_compiled", [True, False])
def test_weights_of_another_model_are_refused(tmp_path, compiled, is_compiled):
    wide = dataclasses.replace(GEOMETRY, hidden_size=96)
    write_adapter_file(
        tmp_path / "a",
        AdapterWeights(
            make_weights(wide, [list(row) for row in MIXED], torch.Generator().manual_seed(0))
        ),
    )
    packer = FilePacker(torch.float32, compiled if is_compiled else None)
    with pytest.raises(ValueError, match="expected"):
        filled(packer, tmp_path / "a", AdapterLayout(POOL, AdapterSpec(MIXED)), torch.float32)
