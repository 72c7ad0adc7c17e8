"""What cannot be served exactly is refused, by name, with every reason at once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig

from loraplex_server.adapters.errors import AdapterRefused
from tests.support.adapters import (
    LINEARS,
    make_config,
    make_folder,
    make_tensors,
    make_tiny_base,
    read_folder,
)

QV = ["q_proj", "v_proj"]

UNSUPPORTED = {
    "modules_to_save": (
        LoraConfig(target_modules=QV, modules_to_save=["up_proj"]),
        "trained in full has no low rank",
    ),
    "monteclora_config": (
        LoraConfig(target_modules=QV, monteclora_config=MontecloraConfig()),
        "no one output",
    ),
    "layer_replication": (
        LoraConfig(target_modules=QV, layer_replication=[(0, 2), (1, 2)]),
        "the base has only 2 layers",
    ),
    "pissa_niter": (
        LoraConfig(target_modules=QV, init_lora_weights="pissa_niter_4"),
        "path_initial_model",
    ),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_peft_can_save_and_we_cannot_serve_is_refused_by_name(tmp_path: Path, field: str):
    config, way_out = UNSUPPORTED[field]
    save_unmerged(tmp_path, config)
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    text = "; ".join(refusal.value.reasons)
    assert way_out in text


def save_unmerged(folder: Path, config: object) -> None:
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
    ("bias", "own"),
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
    ("use_qalora", "yes"),
    ("use_dora", "yes"),
    ("use_bdlora", True),
    ("use_bdlora", {"nblocks": 0}),
    ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": "q_proj"}),
    ("kasa_config", {"alpha": 1}),
    ("alora_invocation_tokens", [101]),
    ("alora_invocation_tokens", "hello"),
    ("trainable_token_indices", [1, 1]),
    ("trainable_token_indices", [101]),
    ("trainable_token_indices", {"wte": [1]}),
    ("modules_to_save", {"a": 1}),
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
    "lora_B.bias": {f"{STEM}.lora_B.bias": torch.zeros(64)},
    "base_layer.bias": {f"{STEM}.base_layer.bias": torch.zeros(64)},
    "lora_diag": {f"{STEM}.lora_diag": torch.zeros(4)},
    "lm_head: has tensors, but": {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(101, 4),
    },
    "has 105 rows": {"base_model.model.lm_head.weight": torch.zeros(105, 64)},
    "token_adapter": {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(64)
    },
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
    config = make_config(loftq=1, bias="own", mystery=3, base_model_name_or_path="other")
    make_folder(tmp_path, config=config, tensors=tensors)
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    reasons = refusal.value.reasons
    assert len(reasons) == 6
    for part in ("loftq", "bias=", "mystery", "other", "and 5 more: of a variant", "NaN"):
        assert sum(part in reason for reason in reasons) >= 1, part
