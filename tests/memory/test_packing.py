"""From weights over the canonical file into pages: nothing is lost, and nothing wrong gets in."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_memory import packing
from loraplex_memory.adapter_file import (
    FORMAT,
    read_adapter_file,
    read_raw_adapter,
    write_adapter_file,
)
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.errors import AdapterFileError
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool
from loraplex_memory.scratch import Scratch
from tests.support.kernel_cases import make_weights

GEOMETRY = ModelGeometry(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
POOL = PoolLayout(GEOMETRY, page_tokens=4)
RANKS = ((3, 0, 2, 1, 0, 4, 5), (0, 0, 0, 0, 0, 0, 2))


@pytest.fixture
def weights():
    ranks = [list(row) for row in RANKS]
    return AdapterWeights(make_weights(GEOMETRY, ranks, torch.Generator().manual_seed(0)))


@pytest.fixture
def layout():
    return AdapterLayout(POOL, AdapterSpec(RANKS))


# ---- packing -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_lies_where_the_layout_says(weights, layout, dtype):
    packed = pack_adapter(weights, layout, dtype=dtype)
    assert packed.shape == (2, layout.num_pages, POOL.page_elems)
    for (layer, projection), pair in weights.lora.items():
        at = PROJECTIONS.index(projection)
        row = packed[layer].flatten()
        a = row[layout.a_chunks[layer][at] * POOL.chunk_elems :][: pair.a.numel()]
        b = row[layout.b_chunks[layer][at] * POOL.chunk_elems :][: pair.b.numel()]
        assert torch.equal(a.view(pair.a.shape), pair.a.to(dtype))
        assert torch.equal(b.view(pair.b.T.shape), (pair.b * pair.scale).T.to(dtype))
    assert packed.count_nonzero() == sum(p.a.numel() + p.b.numel() for p in weights.lora.values())


@pytest.mark.parametrize("run_elems", [1, 300, 1 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_lie_side_by_side_are_packed_alike(
    tmp_path, monkeypatch, stored, dtype, run_elems
):
    """A file's matrices are packed many layers at once: twelve, in the order of their names."""
    geometry = dataclasses.replace(GEOMETRY, num_layers=12)
    ranks = [[2, 1, 0, 3, 1, 0, 2]] * 5 + [[0, 1, 4, 3, 1, 0, 2]] * 7
    ranks[9] = [0] * 7
    monkeypatch.setattr(packing, "_RUN_ELEMS", run_elems)
    apart = {
        key: LoRAPair(pair.a.to(stored), pair.b.to(stored), 0.1 * key[0] + 0.3)
        for key, pair in make_weights(geometry, ranks, torch.Generator().manual_seed(1)).items()
    }
    layout = AdapterLayout(
        PoolLayout(geometry, page_tokens=4), AdapterSpec(tuple(map(tuple, ranks)))
    )
    write_adapter_file(tmp_path / "a", AdapterWeights(apart))
    file_memory, pack_memory = Scratch(), Scratch()
    pack_memory.take((12, layout.num_pages, POOL.page_elems), dtype).fill_(float("nan"))
    packed = pack_adapter(
        read_raw_adapter(tmp_path / "a", file_memory).weights(),
        layout,
        dtype=dtype,
        scratch=pack_memory,
    )
    expected = torch.zeros_like(packed).view(12, -1)
    for (layer, projection), pair in apart.items():
        at = PROJECTIONS.index(projection)
        for matrix, chunk in (
            (pair.a, layout.a_chunks[layer][at]),
            ((pair.b.float() * pair.scale).T, layout.b_chunks[layer][at]),
        ):
            start = chunk * POOL.chunk_elems
            expected[layer, start : start + matrix.numel()] = matrix.reshape(-1).to(dtype)
    assert torch.equal(packed.view(12, -1), expected)


def test_weights_in_any_order_in_memory_are_packed():
    ranks = ((2, 1, 0, 3, 1, 0, 2),) * 5
    geometry = dataclasses.replace(GEOMETRY, num_layers=5)
    weights = make_weights(geometry, ranks, torch.Generator().manual_seed(2))
    layout = AdapterLayout(PoolLayout(geometry, page_tokens=4), AdapterSpec(ranks))
    fresh = pack_adapter(AdapterWeights(weights), layout, dtype=torch.float32)
    memory = torch.cat([m.reshape(-1) for pair in weights.values() for m in (pair.a, pair.b)])
    for order in (sorted(weights), sorted(weights, reverse=True)):
        a_stop, b_stop, turned = 0, memory.numel(), {}
        for key in order:  # A from the front, B from the back
            pair = weights[key]
            a, b = memory[a_stop:][: pair.a.numel()], memory[:b_stop][-pair.b.numel() :]
            a_stop, b_stop = a_stop + pair.a.numel(), b_stop - pair.b.numel()
            a, b = a.view(pair.a.shape), b.view(pair.b.shape)
            turned[key] = LoRAPair(a.copy_(pair.a), b.copy_(pair.b), pair.scale)
        assert torch.equal(pack_adapter(AdapterWeights(turned), layout, dtype=torch.float32), fresh)


def test_weights_of_any_strides_are_packed(weights, layout):
    fresh = pack_adapter(weights, layout, dtype=torch.float32)
    turned = {
        key: LoRAPair(pair.a.T.contiguous().T, pair.b.T.contiguous().T, pair.scale)
        for key, pair in weights.lora.items()
    }
    assert torch.equal(pack_adapter(AdapterWeights(turned), layout, dtype=torch.float32), fresh)


def test_a_module_that_is_missing_is_refused(weights, layout):
    del weights.lora[0, "v"]
    with pytest.raises(ValueError, match="modules"):
        pack_adapter(weights, layout, dtype=torch.float32)


@pytest.mark.parametrize("key", [(0, "k"), (2, "q"), (-1, "q")], ids=str)
def test_a_module_without_room_is_refused(weights, layout, key):
    weights.lora[key] = weights.lora[0, "q"]
    with pytest.raises(ValueError, match="modules"):
        pack_adapter(weights, layout, dtype=torch.float32)


def test_a_matrix_of_another_length_is_refused(weights, layout):
    pair = weights.lora[0, "down"]
    weights.lora[0, "down"] = dataclasses.replace(pair, a=pair.a[:, :-1].contiguous())
    with pytest.raises(ValueError, match="layer 0 down"):
        pack_adapter(weights, layout, dtype=torch.float32)


# ---- the pool ------------------------------------------------------------------------------


def test_writing_touches_the_adapters_pages_and_no_other(weights, layout):
    pool = PagePool(POOL, layout.num_pages + 5, dtype=torch.float32)
    pool.data.fill_(-1.0)
    packed = pack_adapter(weights, layout, dtype=torch.float32)
    pages = [*range(layout.num_pages + 4, 4, -1)]
    pool.write(pages, packed)
    assert torch.equal(pool.data[:, pages], packed)
    assert (pool.data[:, :5] == -1.0).all()


def test_scratch_memory_is_used_again_unless_it_is_very_large():
    scratch = Scratch(max_kept_bytes=1000)
    first = scratch.take((10, 25), torch.float32)
    again = scratch.take((3, 5), torch.bfloat16)
    assert (first.shape, again.shape, again.dtype) == ((10, 25), (3, 5), torch.bfloat16)
    assert first.data_ptr() == again.data_ptr()
    large = scratch.take((251,), torch.float32)
    assert large.numel() == 251
    assert scratch.take((1,), torch.float32).data_ptr() == first.data_ptr()


# ---- the file ------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_written(weights, tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter_file(path, weights)
    again = read_adapter_file(path)
    assert again.lora.keys() == weights.lora.keys()
    for key, pair in weights.lora.items():
        assert torch.equal(again.lora[key].a, pair.a)
        assert torch.equal(again.lora[key].b, pair.b)
        assert again.lora[key].scale == pair.scale
    assert again.spec(GEOMETRY.num_layers) == AdapterSpec(RANKS)


def test_parts_come_back_and_lie_where_the_layout_says(weights, tmp_path):
    parts, ids = make_parts(), {"token_ids": (3, 9), "invocation_token_ids": (7, 7, 1)}
    weights = dataclasses.replace(weights, parts=parts, **ids)
    write_adapter_file(tmp_path / "a", weights)
    again = read_adapter_file(tmp_path / "a")
    assert again.parts.keys() == parts.keys()
    assert all(torch.equal(again.parts[key], parts[key]) for key in parts)
    layout = AdapterLayout(POOL, again.spec(GEOMETRY.num_layers))
    assert (layout.spec.token_ids, layout.spec.invocation_token_ids) == tuple(ids.values())
    packed = pack_adapter(again, layout, dtype=torch.float32)
    assert packed.shape[1] == layout.num_pages > layout.num_layer_pages
    # Slice s is layer s % L of page s // L behind the layers' pages.
    slices = packed[:, layout.num_layer_pages :].transpose(0, 1).flatten()
    for (name, layer), tensor in parts.items():
        part = layout.spec.part(name)
        starts, flat = layout.layer_part(name), slices
        if layer is not None:
            assert starts is not None
            flat = packed[layer].flatten()
        start = layout.model_part(name) if layer is None else starts[layer]
        pitch = layout.row_pitch(part)
        rows = flat[start * POOL.chunk_elems :][: part.num_rows * pitch].view(-1, pitch)
        assert torch.equal(rows[:, : part.row_elems], tensor)
        assert not rows[:, part.row_elems :].any()
    # What the rounding of an output scale left over is 0 in float32.
    elems = sum(pair.a.numel() + pair.b.numel() for pair in weights.lora.values())
    assert packed.count_nonzero() == elems + sum(tensor.numel() for tensor in parts.values())


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_an_output_scale_loses_nothing_to_a_bfloat16_pool(size):
    generator = torch.Generator().manual_seed(0)
    scales = size * (1 + 0.1 * torch.randn(1, 32, generator=generator))
    weights = AdapterWeights(parts={("out_scale.q", 0): scales})
    layout = AdapterLayout(POOL, weights.spec(GEOMETRY.num_layers))
    packed = pack_adapter(weights, layout, dtype=torch.bfloat16)
    pitch = layout.row_pitch(layout.spec.part("out_scale.q"))
    served = packed[0].flatten()[: 2 * pitch].float().view(2, pitch).sum(0)[:32]
    torch.testing.assert_close(served, scales[0], rtol=2**-16, atol=0)
    assert not torch.isclose(scales, scales.bfloat16().float(), rtol=1e-3, atol=0).all()


def make_parts():
    """One of each kind: of some layers, of all, of the model; rows of odd lengths too."""
    shapes = {
        ("out_scale.q", 0): (1, 32),
        ("bias.v", 0): (1, 16),
        ("bias.v", 1): (1, 16),
        ("in_scale.o", 1): (1, 32),
        ("norm.q", 1): (1, 8),
        ("kv_prefix", 0): (5, 32),
        ("kv_prefix", 1): (5, 32),
        ("token_rows", None): (2, 32),
        ("norm.final", None): (1, 32),
        ("embedding.A", None): (101, 3),
        ("embedding.B", None): (3, 32),
        ("head.B", None): (3, 101),
    }
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_a_missing_file_is_an_adapter_file_error(tmp_path):
    with pytest.raises(AdapterFileError, match="nothing here"):
        read_adapter_file(tmp_path / "nothing here")


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_truncated_file_is_an_adapter_file_error(weights, tmp_path, num_bytes):
    path = tmp_path / "a.safetensors"
    write_adapter_file(path, weights)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(AdapterFileError):
        read_adapter_file(path)


def save_with(path, metadata, pair=None):
    pair = pair or LoRAPair(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    save_file({"0.q.A": pair.a, "0.q.B": pair.b}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, FORMAT),
        ({"format": "pt"}, FORMAT),
        ({FORMAT: "[]"}, "scales are missing"),
        ({FORMAT: "{}"}, "scales are missing"),
        ({FORMAT: '{"scales": [1]}'}, "scales are missing"),
        ({FORMAT: '{"scales": {"0.q": "1"}}'}, "scales are missing"),
        ({FORMAT: "{"}, "line 1"),
        ({FORMAT: '{"scales": {}}'}, "do not match: 0.q.A"),
        ({FORMAT: '{"scales": {"0.q": 1.0}}'}, "token ids are missing"),
        ({FORMAT: '{"scales": {"0.q": 1.0}, "token_ids": ["1"]}'}, "token ids are missing"),
        ({FORMAT: '{"scales": {"0.q": 1.0, "0.k": 1.0}}'}, "do not match: 0.k.A, 0.k.B"),
    ],
)
def test_a_header_that_is_wrong_is_an_adapter_file_error(tmp_path, metadata, reason):
    path = tmp_path / "a.safetensors"
    save_with(path, metadata)
    with pytest.raises(AdapterFileError, match=reason):
        read_adapter_file(path)


@pytest.mark.parametrize("key", ["0.qkv", "q", "-1.q", "x.q", "0.q.q"])
def test_an_unknown_module_is_an_adapter_file_error(tmp_path, key):
    path = tmp_path / "a.safetensors"
    save_with(path, None)
    renamed = {name.replace("0.q", key): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={FORMAT: json.dumps({"scales": {key: 1.0}})})
    with pytest.raises(AdapterFileError, match="unknown module"):
        read_adapter_file(path)


def spoil(path, change):
    """Rewrite a file's header."""
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[stop:])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "I32"},
        {"dtype": ["F32"]},
        {"shape": [2, 31]},
        {"shape": [64]},
        {"shape": [-2, -32]},
        {"shape": [2.0, 32]},
        {"shape": [10**12, 0], "data_offsets": [0, 0]},
        {"data_offsets": [0, 10**12]},
        {"data_offsets": [512, 768]},
        {"data_offsets": [2, 258]},
        {"data_offsets": "ab"},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_a_tensor_described_wrongly_is_an_adapter_file_error(tmp_path, entry):
    path = tmp_path / "a.safetensors"
    save_with(path, {FORMAT: '{"scales": {"0.q": 1.0}}'})
    spoil(path, lambda header: header["0.q.A"].update(entry))
    with pytest.raises(AdapterFileError, match=r"0\.q\.A is no matrix within 512 bytes"):
        read_adapter_file(path)


@pytest.mark.parametrize("change", [lambda h: [1], lambda h: h.update(__metadata__=3)])
def test_a_header_of_another_kind_is_an_adapter_file_error(tmp_path, change):
    path = tmp_path / "a.safetensors"
    save_with(path, {FORMAT: '{"scales": {"0.q": 1.0}}'})
    spoil(path, change)
    with pytest.raises(AdapterFileError, match="not an object"):
        read_adapter_file(path)


def test_any_byte_of_a_header_may_be_wrong(weights, tmp_path):
    """It is refused or read, and never a crash."""
    path = tmp_path / "a.safetensors"
    write_adapter_file(path, weights)
    good = path.read_bytes()
    for at in range(0, 8 + int.from_bytes(good[:8], "little"), 7):
        for flip in (1, 0x80):
            bad = bytearray(good)
            bad[at] ^= flip
            path.write_bytes(bad)
            with suppress(AdapterFileError):
                read_adapter_file(path)


def test_a_disk_that_fails_is_an_adapter_file_error(tmp_path):
    """Reading address 0 of a process is what Linux answers with EIO, without a broken disk."""
    path = tmp_path / "a.safetensors"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(AdapterFileError, match="Input/output error"):
        read_adapter_file(path)
