"""Every variant of LoRA: what is served is what PEFT computes with the same folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file

from loraplex_memory.adapter_file import read_adapter_file, write_adapter_file
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.errors import AdapterRefused
from loraplex_server.adapters.identity import adapter_id
from loraplex_server.adapters.reader import ReadAdapter
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.report import ReadingReport, ReportEntry
from tests.support.adapters import (
    cast_weights,
    make_config,
    make_folder,
    make_tensors,
    make_tiny_base,
    read_folder,
)
from tests.support.peft_cases import PeftCase, biased_base, edit_folder
from tests.support.peft_lora_cases import LORA_CASES
from tests.support.served_cases import assert_is_served_exactly, largest_error, read_case


@pytest.mark.parametrize("case", LORA_CASES, ids=str)
def test_a_saved_adapter_is_served_as_peft_computes_it(tmp_path: Path, case: PeftCase):
    case.write(tmp_path)
    assert_is_served_exactly(case, tmp_path)
    assert_is_kept(read_case(case, tmp_path).weights, tmp_path / "kept.safetensors")


def assert_is_kept(weights: AdapterWeights, path: Path) -> None:
    """The canonical file gives back what was read, to the bit."""
    write_adapter_file(path, weights)
    assert adapter_id(read_adapter_file(path)) == adapter_id(weights)


@pytest.mark.parametrize("name", ["dora", "pissa", "kasa", "embedding and head", "saved norms"])
def test_sixteen_bits_are_served_as_peft_widens_them(tmp_path: Path, name: str):
    case = next(case for case in LORA_CASES if case.name == name)
    case.write(tmp_path)
    cast_weights(tmp_path, torch.bfloat16)
    assert_is_served_exactly(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in LORA_CASES if case.naive], ids=str)
def test_who_ignores_what_the_folder_says_is_far_off(tmp_path: Path, case: PeftCase):
    assert case.naive is not None
    case.write(tmp_path)
    expected = case.peft_logits(tmp_path)
    edit_folder(tmp_path, case.naive)
    assert largest_error(case, tmp_path, expected) > 1.0


STEM = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"{STEM}.lora_latent_mapping.weight",
        f"{STEM}.default_lora_latent_mapping.weight",
        f"{STEM}_lora_latent_mapping.weight",
    ],
)
def test_a_matrix_between_b_and_a_is_multiplied_in(tmp_path: Path, name: str):
    """LoRA-XS and LoRA-SB: `s B R A`; the names are those that their own code saves."""
    tensors = make_tensors({"down": 4}, num_layers=1)
    latent = tensors[name] = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    make_folder(tmp_path, tensors=tensors)
    adapter = read_folder(tmp_path)
    a, b = tensors[f"{STEM}.lora_A.weight"], tensors[f"{STEM}.lora_B.weight"]
    assert_updates(adapter, 2.0 * b @ latent @ a)
    assert not adapter.is_native


def test_pooled_inputs_are_taken_apart_as_pefts_layer_pools_them(tmp_path: Path):
    """PEFT has QA-LoRA for layers quantised by GPTQ only, so its own function is the reference."""
    tensors = make_tensors({"down": 4}, num_layers=1)
    a, b = torch.randn(4, 8), tensors[f"{STEM}.lora_B.weight"]
    tensors[f"{STEM}.lora_A.weight"] = a
    config = make_config(use_qalora=True, qalora_group_size=16)
    make_folder(tmp_path, config=config, tensors=tensors)
    layer = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": 2.0},
        qalora_group_size={"default": 16},
        training=False,
        in_features=128,
    )
    columns = QALoraLinearVariant.forward(layer, "default", torch.eye(128), torch.zeros(128, 64))
    assert_updates(read_folder(tmp_path), columns.T)


def assert_updates(adapter: ReadAdapter, expected: torch.Tensor) -> None:
    """The adapter adds `expected` to the first layer's down projection, and nothing else."""
    assert set(adapter.weights.lora) == {(0, "down")}
    pair = adapter.weights.lora[0, "down"]
    torch.testing.assert_close(pair.scale * pair.b @ pair.a, expected, atol=1e-4, rtol=1e-5)


REFUSED_TOGETHER = [
    {"use_dora": True, "kasa_config": {}, "expected": "PEFT does not combine it with use_dora"},
    {"use_dora": True, "lora_bias": True, "expected": "PEFT does not combine it with use_dora"},
    {
        "init_lora_weights": "pissa",
        "alora_invocation_tokens": [5],
        "expected": "cannot be combined with init_lora_weights='pissa'",
    },
    {
        "alora_invocation_tokens": [5],
        "modules_to_save": ["lm_head"],
        "expected": "changes linears only",
    },
    {
        "target_modules": "all-linear",
        "head": True,
        "expected": "has tensors, but target_modules leaves it out",
    },
    {
        "target_modules": ["q_proj", "lm_head"],
        "init_lora_weights": "OLoRA",
        "head": True,
        "expected": "is read on linears of the layers only",
    },
    {
        "target_modules": ["q_proj", "embed_tokens"],
        "trainable_token_indices": [5],
        "expected": "PEFT does not train rows of a module that is adapted or saved as a whole",
    },
]


@pytest.mark.parametrize("fields", REFUSED_TOGETHER, ids=lambda fields: fields["expected"])
def test_what_peft_does_not_combine_is_refused(tmp_path: Path, fields: dict[str, Any]):
    expected = fields["expected"]
    own = ("expected", "head")
    config = make_config(**{key: value for key, value in fields.items() if key not in own})
    tensors = make_tensors({"q": 4})
    if "modules_to_save" in fields:
        tensors["base_model.model.lm_head.weight"] = torch.zeros(101, 64)
    if "head" in fields:
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
        tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(101, 4)
    if "trainable_token_indices" in fields:
        stem = "base_model.model.model.embed_tokens"
        tensors[f"{stem}.token_adapter.trainable_tokens_delta"] = torch.zeros(1, 64)
        tensors[f"{stem}.lora_embedding_A"] = torch.zeros(4, 101)
        tensors[f"{stem}.lora_embedding_B"] = torch.zeros(64, 4)
    make_folder(tmp_path, config=config, tensors=tensors)
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    assert any(expected in reason for reason in refusal.value.reasons)


def test_a_copy_of_the_base_changes_nothing_and_another_replaces_it(tmp_path: Path):
    tensors = make_tensors({"q": 4})
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    own = make_tiny_base().model.embed_tokens.weight.detach()
    tensors[name] = own
    make_folder(tmp_path, tensors=tensors)
    adapter = read_folder(tmp_path)
    assert not adapter.weights.parts
    assert entry_of(adapter.report, name).verdict == "no effect"
    tensors[name] = own.to(torch.bfloat16)
    make_folder(tmp_path, tensors=tensors)
    assert torch.equal(read_folder(tmp_path).weights.parts["embedding", None], tensors[name])
    with pytest.raises(AdapterRefused, match="save_embedding_layers=False"):
        read_folder(tmp_path, limits=AdapterLimits(max_dense_bytes=9999))


def test_a_folded_rank_above_the_limit_is_refused_before_it_is_folded(tmp_path: Path):
    """And before the base is read: of a large model, that takes minutes."""
    base = make_tiny_base()
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    config = make_config(init_lora_weights="pissa")
    make_folder(tmp_path, config=config, tensors=make_tensors({"q": 4}))
    with pytest.raises(AdapterRefused, match=r"q_proj.*: folded rank 8 is above the limit of 7"):
        read_folder(tmp_path, limits=AdapterLimits(max_rank=7), reference=base)


@pytest.mark.parametrize(
    ("names", "fields", "shape"),
    [
        (("model.norm.weight", "model.norm.base_layer.weight"), {"modules_to_save": ["norm"]}, 64),
        (
            ("layers.0.self_attn.q_proj.bias", "layers.0.self_attn.q_proj.base_layer.bias"),
            {"bias": "all"},
            64,
        ),
        (
            ("layers.0.self_attn.q_proj.bias", "layers.0.self_attn.qkv_proj.bias"),
            {"bias": "all"},
            (64, 128),
        ),
    ],
    ids=["norm", "bias", "fused bias"],
)
def test_what_is_given_twice_is_refused(tmp_path: Path, names, fields, shape):
    tensors = make_tensors({"q": 4})
    sizes = shape if isinstance(shape, tuple) else (shape, shape)
    for name, size in zip(names, sizes, strict=True):
        stem = "base_model.model." + ("" if name.startswith("model.") else "model.")
        tensors[stem + name] = torch.ones(size)
    make_folder(tmp_path, config=make_config(**fields), tensors=tensors)
    with pytest.raises(AdapterRefused, match="given"):
        read_folder(tmp_path, reference=biased_base(), check_base=False)


@pytest.mark.parametrize("alpha", [0, -8])
def test_an_initialisation_that_is_no_number_is_refused(tmp_path: Path, alpha: int):
    """PiSSA divides by the scale and takes the root: PEFT's own base would hold NaN."""
    config = make_config(init_lora_weights="pissa", lora_alpha=alpha)
    make_folder(tmp_path, config=config, tensors=make_tensors({"q": 4}))
    with pytest.raises(AdapterRefused, match=r"layer 0 q.*gives NaN or infinity"):
        read_folder(tmp_path)


def test_a_decomposition_that_fails_refuses_the_adapter(tmp_path: Path):
    base = make_tiny_base()
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    config = make_config(init_lora_weights="pissa")
    make_folder(tmp_path, config=config, tensors=make_tensors({"q": 4}))
    with pytest.raises(AdapterRefused, match="folding it fails"):
        read_folder(tmp_path, reference=base)


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices", "use_dora"])
def test_dense_parts_above_the_limit_are_refused_with_their_size(tmp_path: Path, field: str):
    stem = "base_model.model.lm_head"
    tensors = make_tensors({"q": 4})
    if field == "modules_to_save":
        value: object = ["lm_head"]
        tensors[f"{stem}.weight"] = torch.zeros(101, 64)
    elif field == "trainable_token_indices":
        value = {"lm_head": list(range(100))}
        tensors[f"{stem}.token_adapter.trainable_tokens_delta"] = torch.zeros(100, 64)
    else:
        value = True
        tensors[f"{stem}.lora_A.weight"] = torch.zeros(4, 64)
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(101, 4)
        tensors[f"{stem}.lora_magnitude_vector"] = torch.ones(101)
        for layer in range(2):
            q = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{q}.lora_magnitude_vector"] = torch.ones(64)
    config = make_config(target_modules=["q_proj", "lm_head"], **{field: value})
    make_folder(tmp_path, config=config, tensors=tensors)
    assert read_folder(tmp_path)
    with pytest.raises(AdapterRefused, match=r"2\d{4} bytes folded, above the limit of 9999 bytes"):
        read_folder(tmp_path, limits=AdapterLimits(max_dense_bytes=9999))


@pytest.mark.parametrize("case", [*LORA_CASES[:3], *LORA_CASES[9:12]], ids=str)
def test_the_report_names_every_field_and_every_tensor_once(tmp_path: Path, case: PeftCase):
    case.write(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapter = read_case(case, tmp_path)
    named = Counter((entry.kind, entry.subject) for entry in adapter.report.entries)
    assert named == Counter(
        [*(("field", name) for name in fields), *(("tensor", name) for name in tensors)]
    )
    assert adapter.report.count("refused") == 0
    assert adapter.is_native == (adapter.report.count("folded") == 0)


def test_the_report_of_a_refusal_names_every_field_and_every_tensor_too(tmp_path: Path):
    tensors = make_tensors({"q": 4, "v": 4})
    tensors["surprise"] = torch.zeros(1)
    make_folder(tmp_path, config=make_config(use_dora=True, mystery=1, r=5), tensors=tensors)
    with pytest.raises(AdapterRefused) as refusal:
        read_folder(tmp_path)
    report = refusal.value.report
    assert report is not None
    subjects = {entry.subject for entry in report.entries}
    assert subjects >= tensors.keys() | {"use_dora", "mystery", "r", "peft_type"}
    assert entry_of(report, "mystery").verdict == "refused"
    assert entry_of(report, "surprise").verdict == "refused"
    assert entry_of(report, "r").verdict == "applied"


def entry_of(report: ReadingReport, subject: str) -> ReportEntry:
    [entry] = [entry for entry in report.entries if entry.subject == subject]
    return entry
