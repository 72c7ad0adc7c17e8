"""Reading real PEFT folders: what is applied is what PEFT computes, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from loraplex_memory.adapter_file import AdapterWeights
from loraplex_memory.layout import PROJECTIONS
from loraplex_server.adapters.errors import AdapterRefused, InvalidUpload, UploadTooLarge
from loraplex_server.adapters.record import AdapterLimits
from tests.support.adapters import (
    LINEARS,
    TINY,
    make_config,
    make_folder,
    make_tensors,
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
            pair = weights.get((layer, projection))
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
    assert weights[1, "v"].b.dtype == dtype
    assert torch.equal(weights[1, "v"].b, stored[name])


@pytest.mark.parametrize("targets", [["qkv_proj", "gate_up_proj"], ["qkv_proj", "o_proj"], "all"])
def test_fused_linears_of_phi3_are_split_exactly(tmp_path: Path, targets: list[str] | str):
    targets = "all-linear" if targets == "all" else targets
    config = LoraConfig(
        target_modules=targets, r=5, rank_pattern={"qkv_proj": 3}, alpha_pattern={"qkv_proj": 7}
    )
    expected = save_peft_adapter(tmp_path, config, family="phi3")
    assert_is_what_peft_adds(read_folder(tmp_path).weights, expected, family="phi3")


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


UNSUPPORTED = {
    "use_dora": (LoraConfig(target_modules=QV, use_dora=True), "DoRA"),
    "lora_bias": (LoraConfig(target_modules=QV, lora_bias=True), "bias on lora_B"),
    "bias=": (LoraConfig(target_modules=QV, bias="all"), "bias='none'"),
    "modules_to_save": (
        LoraConfig(target_modules=QV, modules_to_save=["lm_head"]),
        "trained in full",
    ),
    "trainable_token_indices": (
        LoraConfig(target_modules=QV, trainable_token_indices=[3, 4]),
        "trained token embeddings",
    ),
    "lora_embedding": (LoraConfig(target_modules=[*QV, "embed_tokens"]), "LoRA on embeddings"),
    "lm_head": (LoraConfig(target_modules=[*QV, "lm_head"]), "not a linear that can carry LoRA"),
    "pissa": (LoraConfig(target_modules=QV, init_lora_weights="pissa"), "path_initial_model"),
    "olora": (LoraConfig(target_modules=QV, init_lora_weights="olora"), "path_initial_model"),
    "kasa_config": (LoraConfig(target_modules=QV, kasa_config=KasaConfig()), "KaSA"),
    "velora_config": (
        LoraConfig(target_modules=QV, velora_config=VeloraConfig(num_groups=4)),
        "VeLoRA",
    ),
    "use_bdlora": (
        LoraConfig(target_modules=QV, use_bdlora=BdLoraConfig(nblocks=2, target_modules_bd_a=QV)),
        "block-diagonal",
    ),
    "alora_invocation_tokens": (
        LoraConfig(target_modules=QV, alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
        "aLoRA",
    ),
    "layer_replication": (
        LoraConfig(target_modules=QV, layer_replication=[(0, 2), (1, 2)]),
        "the base has only 2 layers",
    ),
    "'ADALORA'": (AdaLoraConfig(target_modules=QV, total_step=10), "only 'LORA'"),
    "'IA3'": (IA3Config(target_modules=QV, feedforward_modules=[]), "only 'LORA'"),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_peft_can_save_and_we_cannot_serve_is_refused_by_name(tmp_path: Path, field: str):
    config, way_out = UNSUPPORTED[field]
    save_unmerged(tmp_path, config)
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    text = "; ".join(refusal.value.reasons)
    assert field in text
    assert way_out in text


def save_unmerged(folder: Path, config: object) -> None:
    import warnings

    from peft import get_peft_model

    from tests.support.adapters import make_tiny_base

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(make_tiny_base(), config).save_pretrained(folder)


BAD_FIELDS = [
    ("r", 0),
    ("r", True),
    ("r", "8"),
    ("r", None),
    ("lora_alpha", None),
    ("lora_alpha", "16"),
    ("lora_alpha", 1e40),
    ("lora_alpha", 10**400),
    ("use_rslora", "yes"),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": 1.5}),
    ("rank_pattern", {"q_proj": -4}),
    ("rank_pattern", {"(q_proj": 4}),
    ("rank_pattern", {"(?=q)q_proj": 4}),
    ("alpha_pattern", {"q_proj": "8"}),
    ("alpha_pattern", {r"(\w)\1": 8}),
    ("target_modules", 7),
    ("target_modules", ["q_proj", 1]),
    ("target_modules", "(q_proj"),
    ("exclude_modules", {"a": 1}),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [0, "1"]),
    ("layers_pattern", {"a": 1}),
    ("layers_pattern", 5),
    ("fan_in_fan_out", True),
    ("bias", "lora_only"),
    ("bias", None),
    ("task_type", "SEQ_CLS"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "something new"),
    ("init_lora_weights", None),
    ("init_lora_weights", 1),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("megatron_config", {"a": 1}),
    ("use_qalora", True),
    ("arrow_config", {"top_k": 2}),
    ("monteclora_config", {"num_samples": 2}),
    ("modules_to_save", ["norm"]),
    ("enable_lora", [True, False, True]),
    ("a_field_of_next_year", 0.5),
    ("another_field", True),
    ("base_model_name_or_path", 3),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_field_that_cannot_be_obeyed_is_refused_by_name(
    tmp_path: Path, field: str, value: object
):
    make_folder(tmp_path, config=make_config(**{field: value}))
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    assert any(field in reason for reason in refusal.value.reasons)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_off_is_accepted(tmp_path: Path, value: object):
    make_folder(tmp_path, config=make_config(a_field_of_next_year=value))
    assert read_folder(tmp_path).weights


def test_rank_and_alpha_left_out_are_pefts_defaults(tmp_path: Path):
    config = make_config()
    del config["r"], config["lora_alpha"]
    make_folder(tmp_path, config=config, tensors=make_tensors({"q": 8}))
    assert read_folder(tmp_path).weights[0, "q"].scale == 1.0


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def with_tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = make_tensors()
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


BAD_TENSORS = {
    "holds NaN or infinity": {f"{STEM}.lora_A.weight": torch.full((4, 64), float("nan"))},
    "q_proj.lora_B.weight: holds NaN": {f"{STEM}.lora_B.weight": torch.full((64, 4), -torch.inf)},
    "lora_A is [4, 63]": {f"{STEM}.lora_A.weight": torch.zeros(4, 63)},
    "lora_B is [65, 4]": {f"{STEM}.lora_B.weight": torch.zeros(65, 4)},
    "lora_A is [256]": {f"{STEM}.lora_A.weight": torch.zeros(256)},
    "lora_A is [0, 64]": {f"{STEM}.lora_A.weight": torch.zeros(0, 64)},
    "lora_A is [2, 64]": {
        f"{STEM}.lora_A.weight": torch.zeros(2, 64),
        f"{STEM}.lora_B.weight": torch.zeros(64, 2),
    },
    "is F64": {f"{STEM}.lora_A.weight": torch.zeros(4, 64, dtype=torch.float64)},
    "is I32": {f"{STEM}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int32)},
    "is F8_E4M3": {f"{STEM}.lora_A.weight": torch.zeros(4, 64, dtype=torch.float8_e4m3fn)},
    "has no lora_B": {f"{STEM}.lora_B.weight": None},
    "has no lora_A": {f"{STEM}.lora_A.weight": None},
    "passes float32": {f"{STEM}.lora_B.weight": torch.full((64, 4), 3e38)},
    "adapter's name": {f"{STEM}.lora_A.default.weight": torch.zeros(4, 64)},
    "bare decoder": {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4)},
    "only 2 layers": {
        STEM.replace(".0.", ".2.") + ".lora_A.weight": torch.zeros(4, 64),
        STEM.replace(".0.", ".2.") + ".lora_B.weight": torch.zeros(64, 4),
    },
    "layers.00.": {STEM.replace(".0.", ".00.") + ".lora_A.weight": torch.zeros(4, 64)},
    "rotary_proj": {STEM.replace("q_proj", "rotary_proj") + ".lora_A.weight": torch.zeros(4)},
    "lora_magnitude_vector": {f"{STEM}.lora_magnitude_vector": torch.zeros(64)},
    "a weight of the base": {"base_model.model.model.norm.weight": torch.zeros(64)},
    "unknown tensor": {"surprise": torch.zeros(1)},
    "both fused and split": {
        STEM.replace("q_proj", "qkv_proj") + ".lora_A.weight": torch.zeros(4, 64),
        STEM.replace("q_proj", "qkv_proj") + ".lora_B.weight": torch.zeros(128, 4),
    },
}


@pytest.mark.parametrize("reason", BAD_TENSORS)
def test_a_tensor_that_cannot_be_applied_is_refused_by_name(tmp_path: Path, reason: str):
    config = make_config()
    config["target_modules"] += ["qkv_proj"]
    make_folder(tmp_path, config=config, tensors=with_tensors(**BAD_TENSORS[reason]))
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    assert reason in "; ".join(refusal.value.reasons)


def test_every_reason_is_told_at_once_and_many_of_a_kind_in_one_line(tmp_path: Path):
    tensors = make_tensors({"q": 4, "k": 4, "v": 4, "o": 4})
    for layer in range(2):
        for projection in "qkvo":
            stem = f"base_model.model.model.layers.{layer}.{LINEARS[projection]}"
            tensors[f"{stem}.lora_magnitude_vector"] = torch.zeros(64)
    tensors[f"{STEM}.lora_A.weight"] = torch.full((4, 64), float("nan"))
    config = make_config(use_dora=True, bias="all", mystery=3, base_model_name_or_path="other")
    make_folder(tmp_path, config=config, tensors=tensors)
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    reasons = refusal.value.reasons
    assert len(reasons) == 6
    for part in ("use_dora", "bias=", "mystery", "other", "and 5 more: DoRA", "NaN"):
        assert sum(part in reason for reason in reasons) >= 1, part


def test_tensors_that_peft_would_not_load_are_refused(tmp_path: Path):
    make_folder(tmp_path, config=make_config(target_modules=["q_proj"]))
    with pytest.raises(AdapterRefused, match="PEFT would not load them"):
        read_folder(tmp_path)


def test_a_target_without_tensors_is_no_change(tmp_path: Path):
    make_folder(tmp_path, tensors=make_tensors({"q": 4}, num_layers=1))
    assert set(read_folder(tmp_path).weights) == {(0, "q")}


def test_no_lora_tensors_at_all_is_refused(tmp_path: Path):
    make_folder(tmp_path, tensors={})
    with pytest.raises(AdapterRefused, match="no LoRA tensors"):
        read_folder(tmp_path)


def test_a_rank_above_the_limit_is_refused(tmp_path: Path):
    make_folder(tmp_path)
    with pytest.raises(AdapterRefused, match="above the limit of 3"):
        read_folder(tmp_path, limits=AdapterLimits(max_rank=3))


def test_ranks_up_to_256_are_read(tmp_path: Path):
    make_folder(tmp_path, config=make_config(r=256), tensors=make_tensors({"q": 256}))
    assert read_folder(tmp_path).weights[0, "q"].rank == 256


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
    with pytest.raises(AdapterRefused, match="base_model_check=false"):
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
    assert torch.equal(weights[0, "q"].a, make_tensors()[f"{STEM}.lora_A.weight"])


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
    first, second = (read_folder(tmp_path / name).weights for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].a, second[key].a) for key in first)
