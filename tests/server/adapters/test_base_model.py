"""The base's tensors as conversions get them: float32, by checkpoint name, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_memory.layout import PROJECTIONS
from loraplex_server.adapters.base_model import BaseModel, StateDict
from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.loader import load_spec
from loraplex_server.model.source import ModelSource, resolve_model
from loraplex_server.model.spec import ModelSpec
from tests.support.tiny_models import save_tiny_model, tiny_config, tiny_reference


def in_memory(reference: Any) -> BaseModel:
    spec = ModelSpec.from_config(reference.config, base_name="tiny")
    return BaseModel(spec, StateDict(reference.state_dict()))


def opened(source: ModelSource) -> BaseModel:
    return BaseModel.open(source, load_spec(source))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_every_tensor_of_a_folder_is_the_models_own(tmp_path: Path, family: str):
    reference = save_tiny_model(tmp_path, family)
    base = opened(resolve_model(tmp_path))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(base.tensor(name), tensor), name
    assert base.has_qk_norm == (family == "qwen3")


def test_shards_and_half_precision_come_as_float32(tmp_path: Path):
    reference = tiny_reference(tiny_config()).to(torch.bfloat16)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    base = opened(resolve_model(tmp_path))
    for name, tensor in reference.state_dict().items():
        found = base.tensor(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor.float())


def test_the_default_gguf_model_gives_what_transformers_reads():
    from transformers import AutoModelForCausalLM

    source = resolve_model(None)
    base = opened(source)
    reference = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).state_dict()
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
        full = f"model.layers.7.{name}.weight"
        torch.testing.assert_close(base.tensor(full), reference[full], atol=1e-6, rtol=0)
    assert torch.equal(base.tensor("lm_head.weight"), base.tensor("model.embed_tokens.weight"))


def test_linears_are_cut_and_joined_where_the_checkpoint_differs():
    fused, split = (
        in_memory(tiny_reference(tiny_config("phi3"))),
        in_memory(tiny_reference(tiny_config("qwen2"))),
    )
    for base in (fused, split):
        joined = base.tensor("model.layers.1.self_attn.qkv_proj.weight")
        assert torch.equal(torch.cat([base.weight(1, p) for p in ("q", "k", "v")]), joined)
        joined = base.tensor("model.layers.0.mlp.gate_up_proj.weight")
        assert torch.equal(torch.cat([base.weight(0, p) for p in ("gate", "up")]), joined)
    joined = split.tensor("model.layers.1.self_attn.qkv_proj.bias")
    assert torch.equal(torch.cat([split.bias(1, p) for p in ("q", "k", "v")]), joined)


@pytest.mark.parametrize(
    ("family", "options", "biased"),
    [("llama", {}, ""), ("qwen2", {}, "qkv"), ("llama", {"attention_bias": True}, "qkvo")],
)
def test_projections_have_the_biases_of_their_base(family: str, options: Any, biased: str):
    base = in_memory(tiny_reference(tiny_config(family, **options)))
    for projection in PROJECTIONS:
        bias = base.bias(0, projection)
        assert base.has_bias(projection) == (projection in biased) == (bias is not None)


def test_a_tensor_that_is_not_there_is_a_key_error(tmp_path: Path):
    save_tiny_model(tmp_path)
    base = opened(resolve_model(tmp_path))
    with pytest.raises(KeyError):
        base.tensor("model.layers.9.self_attn.q_proj.weight")
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError):
        base.tensor("model.norm.weight")
