"""The rotation, and the regimes of longrope, which transformers chooses by the company."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loraplex_kernels.reference import rotate
from loraplex_server.model.errors import UnsupportedModel
from loraplex_server.model.rope import build_rope_table
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import fill_weights, random_weights
from tests.server.model.paged_run import PagedRun
from tests.support.tiny_models import (
    LONG_ROPE,
    VOCAB,
    tiny_config,
    tiny_reference,
    tiny_spec,
    transformer_of,
)

PHI3_LONG = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}


def test_rotation_is_the_half_rotation_of_transformers():
    table = build_rope_table(tiny_spec().rope, 50, dtype=torch.float32, device=torch.device("cpu"))
    positions = torch.tensor([0, 7, 49, 3])
    x = torch.randn(4, 3, 8, generator=torch.manual_seed(0))
    angles = positions[:, None].float() * torch.tensor(tiny_spec().rope.inv_freq).repeat(2)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(rotate(x, *table.at(positions)), expected, atol=1e-6, rtol=0)


def test_elements_beyond_the_rotated_ones_pass_through():
    x = torch.randn(4, 2, 8, generator=torch.manual_seed(0))
    cos, sin = torch.zeros(4, 1, 4), torch.ones(4, 1, 4)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], x[..., :4].roll(2, -1))


def test_the_long_regime_of_longrope_equals_transformers_on_a_long_prompt():
    reference = tiny_reference(tiny_config("phi3", **PHI3_LONG))
    tokens = torch.randint(3, VOCAB, (100,), generator=torch.manual_seed(1))
    with torch.inference_mode():
        expected = reference(tokens[None]).logits[0]
    run = PagedRun(transformer_of(reference, max_model_len=128))
    torch.testing.assert_close(run.step({"a": tokens.tolist()})["a"], expected, atol=2e-5, rtol=0)


def test_longrope_of_a_short_sequence_does_not_depend_on_a_long_one_beside_it():
    spec = tiny_spec("phi3", **PHI3_LONG)
    weights = fill_weights(spec, random_weights(spec, 0).items(), dtype=torch.float32)
    short, long = [5, 6, 7], [9] * 90
    alone = PagedRun(Transformer(spec, weights)).step({"a": short})["a"]
    beside = PagedRun(Transformer(spec, weights)).step({"a": short, "b": long})["a"]
    torch.testing.assert_close(beside, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [0, -1, 129])
def test_a_longest_sequence_outside_the_models_positions_is_refused(length):
    spec = tiny_spec()
    weights = fill_weights(spec, random_weights(spec, 0).items(), dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match="max_position_embeddings = 128"):
        Transformer(spec, weights, max_model_len=length)
