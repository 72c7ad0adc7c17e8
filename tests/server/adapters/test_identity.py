"""The id of an adapter is what it computes, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex_memory.adapter_file import read_adapter_file, write_adapter_file
from loraplex_server.adapters.identity import adapter_id
from tests.support.adapters import make_config, make_folder, make_tensors, read_folder


def id_of(folder: Path, **settings: object) -> str:
    return adapter_id(read_folder(make_folder(folder, **settings)).weights)


def test_the_id_is_the_documented_digest(tmp_path: Path):
    tensors = make_tensors({"q": 4}, num_layers=1)
    a, b = (
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{s}.weight"] for s in "AB"
    )
    content = b"loraplex-adapter-2\n0.q float32 4x64 float32 64x4 0x1.0000000000000p+1\n"
    content += a.numpy().tobytes() + b.numpy().tobytes()
    expected = "sha256:" + hashlib.sha256(content).hexdigest()
    assert id_of(tmp_path, tensors=tensors) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.5},
        {"peft_version": "0.1", "inference_mode": True},
        {"base_model_name_or_path": None},
        {"alpha_pattern": {"q_proj": 8, "v_proj": 8}, "lora_alpha": 77},
        {"rank_pattern": {"q_proj": 4, "v_proj": 4}, "r": 9},
        {"use_rslora": True, "lora_alpha": 4},
        {"target_modules": "all-linear"},
    ],
)
def test_what_changes_nothing_keeps_the_id(tmp_path: Path, fields: dict[str, object]):
    changed = id_of(tmp_path / "changed", config=make_config(**fields))
    assert changed == id_of(tmp_path / "plain")


def test_the_order_and_metadata_of_the_file_keep_the_id(tmp_path: Path):
    expected = id_of(tmp_path)
    tensors = dict(reversed(make_tensors().items()))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"made by": "me"})
    assert adapter_id(read_folder(tmp_path).weights) == expected


def test_another_scale_dtype_rank_or_bit_changes_the_id(tmp_path: Path):
    touched = make_tensors()
    next(iter(touched.values()))[0, 0] += 1e-6
    ids = [
        id_of(tmp_path / "plain"),
        id_of(tmp_path / "alpha", config=make_config(lora_alpha=9)),
        id_of(tmp_path / "one alpha", config=make_config(alpha_pattern={"0.self_attn.q_proj": 9})),
        id_of(tmp_path / "rslora", config=make_config(use_rslora=True)),
        id_of(tmp_path / "half", tensors=make_tensors(dtype=torch.float16)),
        id_of(tmp_path / "bfloat", tensors=make_tensors(dtype=torch.bfloat16)),
        id_of(tmp_path / "bit", tensors=touched),
        id_of(tmp_path / "fewer", tensors=make_tensors(num_layers=1)),
        id_of(tmp_path / "swapped", tensors=make_tensors({"v": 4, "q": 4})),
    ]
    assert len(set(ids)) == len(ids)


def test_the_canonical_file_keeps_the_id(tmp_path: Path):
    weights = read_folder(make_folder(tmp_path, tensors=make_tensors(dtype=torch.bfloat16))).weights
    write_adapter_file(tmp_path / "canonical.safetensors", weights)
    again = read_adapter_file(tmp_path / "canonical.safetensors")
    assert adapter_id(again) == adapter_id(weights)
