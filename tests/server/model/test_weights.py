"""Strict loading: every tensor used, every parameter filled."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.native import load_native
from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.weights import EMBEDDING, LM_HEAD, fill_weights, random_weights
from tests.support.tiny_models import tiny_config, tiny_reference, tiny_spec

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def fill(spec, state, dtype=torch.float32):
    return fill_weights(spec, state.items(), dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_random_checkpoint_has_the_names_and_shapes_of_transformers(family):
    state = random_weights(tiny_spec(family), 0)
    reference = tiny_reference(tiny_config(family)).state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in reference.items()}
    fill(tiny_spec(family), state)


def test_a_seed_decides_a_random_checkpoint():
    first, again, other = (random_weights(tiny_spec(), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[Q_PROJ], other[Q_PROJ])


def test_projections_lie_fused_in_order():
    spec = tiny_spec("qwen2")
    state = random_weights(spec, 0)
    layer = fill(spec, state).layers[1]
    qkv, gate_up = layer.qkv.dense_weight(), layer.gate_up.dense_weight()
    prefix = "model.layers.1."
    parts = [state[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv"]
    biases = [state[f"{prefix}self_attn.{p}_proj.bias"] for p in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))
    assert torch.equal(layer.qkv.bias, torch.cat(biases))
    halves = [state[f"{prefix}mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(gate_up, torch.cat(halves))


def test_a_missing_tensor_is_named():
    state = random_weights(tiny_spec(), 0)
    del state[Q_PROJ]
    with pytest.raises(CheckpointError, match="missing") as caught:
        fill(tiny_spec(), state)
    assert caught.value.tensors == (Q_PROJ,)


def test_an_unknown_tensor_is_named():
    state = random_weights(tiny_spec(), 0) | {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(32)
    }
    with pytest.raises(CheckpointError, match=r"no place for: .*q_proj\.bias"):
        fill(tiny_spec(), state)


def test_a_tensor_of_a_wrong_shape_is_named():
    state = random_weights(tiny_spec(), 0) | {Q_PROJ: torch.ones(32, 31)}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight \(32, 31\).*expected \(32, 32\)"):
        fill(tiny_spec(), state)


def test_a_tensor_of_an_integer_dtype_is_named():
    state = random_weights(tiny_spec(), 0) | {Q_PROJ: torch.ones(32, 32, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*int8"):
        fill(tiny_spec(), state)


def test_a_tensor_that_comes_twice_is_refused():
    tensors = list(random_weights(tiny_spec(), 0).items())
    with pytest.raises(CheckpointError, match="no place for"):
        fill_weights(tiny_spec(), [*tensors, tensors[0]], dtype=torch.float32)


def test_rotary_buffers_of_old_checkpoints_are_ignored():
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    fill(tiny_spec(), random_weights(tiny_spec(), 0) | {name: torch.ones(4)})


def test_a_tied_head_is_the_embedding():
    spec = tiny_spec(tie_word_embeddings=True)
    weights = fill(spec, random_weights(spec, 0))
    assert torch.equal(weights.lm_head.dense_weight(), weights.embedding)


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_contradict_it():
    spec = tiny_spec(tie_word_embeddings=True)
    state = random_weights(spec, 0)
    embedding = state["model.embed_tokens.weight"]
    fill(spec, state | {LM_HEAD: embedding.clone()}, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        fill(spec, state | {LM_HEAD: embedding + 1})


def test_weights_take_the_dtype_asked_for():
    state = random_weights(tiny_spec(), 0)
    weights = fill(tiny_spec(), state, dtype=torch.bfloat16)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights.layers[1].qkv.dense_weight()[:32], state[Q_PROJ].bfloat16())


@pytest.mark.skipif(load_native() is None, reason="no C compiler")
def test_int8_rounds_every_linear_and_leaves_the_embedding():
    spec = tiny_spec(tie_word_embeddings=True)
    state = random_weights(spec, 0)
    weights = fill_weights(spec, state.items(), dtype=torch.float32, quantization="int8")
    assert weights.is_int8
    assert all(linear.is_int8 for linear in weights.linears)
    assert torch.equal(weights.embedding, state[EMBEDDING])
    assert not torch.equal(weights.lm_head.dense_weight(), weights.embedding)
    assert not fill(spec, state).is_int8
