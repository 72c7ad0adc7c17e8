"""Reading real PEFT folders: what is applied is what PEFT computes, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS
from loraplex_server.adapters.errors import AdapterRefused, InvalidUpload, UploadTooLarge
from loraplex_server.adapters.record import AdapterLimits
from tests.support.adapters import (
    LINEARS,
    TINY,
    make_config,
    make_folder,
    make_tensors,
    make_tiny_base,
    read_folder,
    save_peft_adapter,
)

QV = ["q_proj", "v_proj"]
ALL = [path.split(".")[1] for path in LINEARS.values()]


def deltas_of(weights: AdapterWeights, family: str = "llama") -> dict[str, torch.Tensor]:
    """Return the dense update of every base weight, named as the base names it."""
    dense = {}
    for layer in range(TINY.num_layers):
        for projection in PROJECTIONS:
            pair = weights.lora.get((layer, projection))
            delta = (
                pair.scale * (pair.b.float() @ pair.a.float())
                if pair
                else torch.zeros(TINY.out_features(projection), TINY.in_features(projection))
            )
            dense[f"model.layers.{layer}.{LINEARS[projection]}.weight"] = delta
        if family == "phi3":
            stem = f"model.layers.{layer}."
            dense[f"{stem}self_attn.qkv_proj.weight"] = torch.cat(
                [dense.pop(f"{stem}self_attn.{p}_proj.weight") for p in "qkv"]
            )
            dense[f"{stem}mlp.gate_up_proj.weight"] = torch.cat(
                [dense.pop(f"{stem}mlp.{p}_proj.weight") for p in ("gate", "up")]
            )
    return dense


def assert_is_what_peft_adds(
    weights: AdapterWeights, expected: dict[str, torch.Tensor], family: str = "llama"
) -> None:
    dense = deltas_of(weights, family)
    for name, delta in expected.items():
        actual = dense.pop(name, torch.zeros_like(delta))
        torch.testing.assert_close(actual, delta, atol=1e-5, rtol=0, msg=name)
    assert not dense, "an update of a weight that the base does not have"


SUPPORTED = {
    "defaults": LoraConfig(target_modules=QV),
    "all-linear": LoraConfig(target_modules="all-linear", r=3),
    "rslora": LoraConfig(target_modules=ALL, r=16, lora_alpha=5, use_rslora=True),
    "patterns": LoraConfig(
        target_modules=ALL,
        r=4,
        lora_alpha=3,
        # In sorted order, since PEFT sorts on saving and takes the first match on loading.
        rank_pattern={"layers.0.self_attn.q_proj": 1, r"layers\.1\..*": 9, "v_proj": 7},
        alpha_pattern={"^model.layers.1.mlp.up_proj": 32, "(q|k)_proj": 0.5, "o_proj": -2},
    ),
    "patterns and rslora": LoraConfig(
        target_modules=ALL,
        use_rslora=True,
        rank_pattern={"down_proj": 5, "1.mlp.(gate|up)_proj": 6},
        alpha_pattern={r"layers.\d.self_attn.(k|o)_proj": 11},
    ),
    "layers_to_transform": LoraConfig(
        target_modules=ALL, layers_to_transform=[1], layers_pattern="layers"
    ),
    "exclude_modules": LoraConfig(target_modules=ALL, exclude_modules=["v_proj"]),
    "regex target": LoraConfig(target_modules=r".*\.(0|1)\.mlp\.(gate|down)_proj"),
    "init false": LoraConfig(target_modules=QV, init_lora_weights=False),
    "gaussian": LoraConfig(target_modules=QV, init_lora_weights="gaussian"),
    "orthogonal": LoraConfig(target_modules=QV, init_lora_weights="orthogonal"),
    "mica": LoraConfig(target_modules=QV, init_lora_weights="mica"),
    "dropout": LoraConfig(target_modules=QV, lora_dropout=0.3),
    "rank 64 of hidden 64": LoraConfig(target_modules=["down_proj"], r=64),
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_supported_adapters_add_exactly_what_peft_adds(tmp_path: Path, case: str):
    expected = save_peft_adapter(tmp_path, SUPPORTED[case])
    assert sum(delta.abs().sum() for delta in expected.values()) > 0
    assert_is_what_peft_adds(read_folder(tmp_path).weights, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_its_bits(tmp_path: Path, dtype: torch.dtype):
    save_peft_adapter(tmp_path, LoraConfig(target_modules=QV), dtype=dtype)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    weights = read_folder(tmp_path).weights
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert weights.lora[1, "v"].b.dtype == dtype
    assert torch.equal(weights.lora[1, "v"].b, stored[name])


@pytest.mark.parametrize("targets", [["qkv_proj", "gate_up_proj"], ["qkv_proj", "o_proj"], "all"])
def test_fused_linears_of_phi3_are_split_exactly(tmp_path: Path, targets: list[str] | str):
    targets = "all-linear" if targets == "all" else targets
    config = LoraConfig(
        target_modules=targets, r=5, rank_pattern={"qkv_proj": 3}, alpha_pattern={"qkv_proj": 7}
    )
    expected = save_peft_adapter(tmp_path, config, family="phi3")
    weights = read_folder(tmp_path, reference=make_tiny_base("phi3")).weights
    assert_is_what_peft_adds(weights, expected, family="phi3")


@pytest.mark.parametrize("field", ["use_rslora", "alpha_pattern", "lora_alpha"])
def test_ignoring_a_scale_field_would_be_noticed(tmp_path: Path, field: str):
    config = LoraConfig(
        target_modules=QV, r=4, lora_alpha=32, use_rslora=True, alpha_pattern={"v_proj": 1}
    )
    expected = save_peft_adapter(tmp_path, config)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    with pytest.raises(AssertionError):
        assert_is_what_peft_adds(read_folder(tmp_path).weights, expected)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_off_is_accepted(tmp_path: Path, value: object):
    make_folder(tmp_path, config=make_config(a_field_of_next_year=value))
    assert read_folder(tmp_path).weights


def test_rank_and_alpha_left_out_are_pefts_defaults(tmp_path: Path):
    config = make_config()
    del config["r"], config["lora_alpha"]
    make_folder(tmp_path, config=config, tensors=make_tensors({"q": 8}))
    assert read_folder(tmp_path).weights.lora[0, "q"].scale == 1.0


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def test_tensors_that_peft_would_not_load_are_refused(tmp_path: Path):
    make_folder(tmp_path, config=make_config(target_modules=["q_proj"]))
    with pytest.raises(AdapterRefused, match="PEFT would not load them"):
        read_folder(tmp_path)


def test_a_target_without_tensors_is_no_change(tmp_path: Path):
    make_folder(tmp_path, tensors=make_tensors({"q": 4}, num_layers=1))
    assert set(read_folder(tmp_path).weights.lora) == {(0, "q")}


def test_no_lora_tensors_at_all_is_refused(tmp_path: Path):
    make_folder(tmp_path, tensors={})
    with pytest.raises(AdapterRefused, match="no tensors of an adapter"):
        read_folder(tmp_path)


def test_a_rank_above_the_limit_is_refused(tmp_path: Path):
    make_folder(tmp_path)
    with pytest.raises(AdapterRefused, match="above the limit of 3"):
        read_folder(tmp_path, limits=AdapterLimits(max_rank=3))


def test_ranks_up_to_256_are_read(tmp_path: Path):
    make_folder(tmp_path, config=make_config(r=256), tensors=make_tensors({"q": 256}))
    assert read_folder(tmp_path).weights.lora[0, "q"].rank == 256


def test_a_pattern_made_to_hang_is_answered_quickly(tmp_path: Path):
    make_folder(tmp_path, config=make_config(rank_pattern={"(((.*)*)*)*x": 4, "(.|m)*(.|m)*y": 4}))
    assert read_folder(tmp_path).weights


@pytest.mark.parametrize(
    "recorded",
    [
        "tiny-llama",
        "acme/Tiny-Llama",
        "/home/me/tiny-llama/",
        "unsloth/tiny-llama-bnb-4bit",
        "",
        None,
    ],
)
def test_the_same_base_under_usual_names_is_accepted(tmp_path: Path, recorded: str | None):
    make_folder(tmp_path, config=make_config(base_model_name_or_path=recorded))
    assert read_folder(tmp_path).base_model == (recorded or None)


def test_another_base_is_refused_unless_the_check_is_off(tmp_path: Path):
    make_folder(tmp_path, config=make_config(base_model_name_or_path="acme/tiny-llama-instruct"))
    with pytest.raises(AdapterRefused, match="check_base=false"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, check_base=False).weights
    assert read_folder(tmp_path, base_names=("x", "/models/tiny-llama-instruct")).weights


def replace_weights(folder: Path, content: bytes) -> None:
    make_folder(folder)
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_pickles_are_refused_unread_with_the_way_out(tmp_path: Path):
    make_folder(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    for is_zip in (True, False):
        torch.save(make_tensors(), weights, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(InvalidUpload, match="safe_serialization=True"):
            read_folder(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidUpload, match=r"adapter_model\.bin"):
        read_folder(tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 9, 100, -1, -64])
def test_truncated_weights_are_refused(tmp_path: Path, cut: int):
    make_folder(tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    replace_weights(tmp_path, whole[:cut])
    with pytest.raises(InvalidUpload, match=r"adapter_model\.safetensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "wide", "shape": [2], "data_offsets": [0, 8]}},
        [],
        {"a": 1},
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: object):
    text = json.dumps(header).encode()
    replace_weights(tmp_path, len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InvalidUpload):
        read_folder(tmp_path)


def test_a_header_at_an_odd_offset_is_read_right(tmp_path: Path):
    make_folder(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip() + b" " * 3
    header += b" " * ((len(header) + 1) % 2)
    assert (8 + len(header)) % 2 == 1
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    weights = read_folder(tmp_path).weights
    assert torch.equal(weights.lora[0, "q"].a, make_tensors()[f"{STEM}.lora_A.weight"])


@pytest.mark.parametrize("low_bytes", [b"\x80\x02", b"\x80\x05"])
def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path, low_bytes: bytes):
    make_folder(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    padded = int.from_bytes(low_bytes, "little")
    while padded < length:
        padded += 1 << 16
    header = whole[8 : 8 + length].ljust(padded)
    path.write_bytes(padded.to_bytes(8, "little") + header + whole[8 + length :])
    assert read_folder(tmp_path).weights


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"r": NaN}', '{"r": 4, "r": 8}', "[" * 100_000, '"\ud800"', "\xff"],
)
def test_a_configuration_that_is_not_one_json_object_is_refused(tmp_path: Path, text: str):
    make_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(
        text.encode("latin-1", "surrogatepass") if text != '"\ud800"' else b'"\xed\xa0\x80"'
    )
    with pytest.raises(InvalidUpload, match=r"adapter_config\.json"):
        read_folder(tmp_path)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    (make_folder(tmp_path) / missing).unlink()
    with pytest.raises(InvalidUpload, match=missing):
        read_folder(tmp_path)


def test_limits_on_sizes_hold(tmp_path: Path):
    make_folder(tmp_path)
    with pytest.raises(InvalidUpload, match=r"larger than 10 bytes"):
        read_folder(tmp_path, limits=AdapterLimits(max_config_bytes=10))
    with pytest.raises(InvalidUpload, match=r"header of"):
        read_folder(tmp_path, limits=AdapterLimits(max_header_bytes=10))
    with pytest.raises(UploadTooLarge):
        read_folder(tmp_path, limits=AdapterLimits(max_upload_bytes=1000))
    with pytest.raises(AdapterRefused, match="at most 7"):
        read_folder(tmp_path, limits=AdapterLimits(max_tensors=7))


def test_order_of_tensors_in_the_file_does_not_matter(tmp_path: Path):
    tensors = make_tensors()
    make_folder(tmp_path / "a", tensors=tensors)
    make_folder(tmp_path / "b", tensors=tensors)
    path = tmp_path / "b" / "adapter_model.safetensors"
    save_file(dict(reversed(tensors.items())), path, metadata={"format": "pt"})
    first, second = (read_folder(tmp_path / name).weights.lora for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].a, second[key].a) for key in first)
