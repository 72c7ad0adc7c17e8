"""What a config turns into, and what is refused by name."""

from __future__ import annotations

import pytest
from transformers import GemmaConfig

from loraplex_server.model.errors import UnsupportedModel
from loraplex_server.model.spec import ModelSpec
from tests.support.tiny_models import LONG_ROPE, SIZES, tiny_config, tiny_spec

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
REFUSED = {
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "quantization": (
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config",
    ),
    "soft-capping": ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "multiplier": ("llama", {"attention_multiplier": 0.5}, "attention_multiplier"),
    "experts": ("qwen3", {"num_experts": 8}, "num_experts"),
    "no-rope-layers": ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "llama-window": ("llama", {"sliding_window": 16}, "sliding_window"),
    "mistral-bias": ("mistral", {"attention_bias": True}, "attention_bias"),
    "mistral-layer-types": (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    "qwen-types-without-window": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window",
    ),
    "dynamic-rope": ("llama", {"rope_parameters": DYNAMIC}, "rope_parameters.rope_type"),
    "llama-partial-rotary": (
        "llama",
        {"rope_parameters": PARTIAL},
        "rope_parameters.partial_rotary_factor",
    ),
    "unknown-rope-parameter": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2]}},
        "rope_parameters.mrope_section",
    ),
    "classifier": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures",
    ),
    "type-of-another-family": (
        "llama",
        {"architectures": ["Qwen2ForCausalLM"]},
        "model_type",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case):
    family, options, name = REFUSED[case]
    with pytest.raises(UnsupportedModel) as caught:
        tiny_spec(family, **options)
    assert caught.value.field == name
    assert name in str(caught.value)


def test_another_architecture_is_refused_and_the_supported_ones_named():
    config = GemmaConfig(**SIZES, architectures=["GemmaForCausalLM"])
    with pytest.raises(UnsupportedModel, match=r"GemmaForCausalLM.*Qwen3ForCausalLM"):
        ModelSpec.from_config(config, base_name="gemma")


def test_an_unknown_rope_type_is_refused():
    config = tiny_config()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModel, match="spiral"):
        ModelSpec.from_config(config, base_name="tiny")


def test_kv_heads_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(UnsupportedModel, match="num_key_value_heads"):
        tiny_spec(num_key_value_heads=3)


def test_layer_types_of_another_kind_are_refused():
    with pytest.raises(UnsupportedModel, match="layer_types"):
        tiny_spec("qwen3", layer_types=["full_attention", "chunked_attention"])


def test_a_config_without_architectures_goes_by_its_model_type():
    assert tiny_spec("qwen2", architectures=None).architecture == "Qwen2ForCausalLM"


def test_neutral_values_of_foreign_options_are_accepted():
    spec = tiny_spec("llama", attention_multiplier=1.0, num_experts=0, sliding_window=None)
    assert spec.architecture == "LlamaForCausalLM"


def test_end_tokens_of_config_and_generation_config_are_merged():
    config = tiny_config(eos_token_id=[2, 5])
    spec = ModelSpec.from_config(config, base_name="tiny", eos_token_ids={7})
    assert spec.eos_token_ids == {2, 5, 7}
    assert tiny_spec(eos_token_id=None).eos_token_ids == frozenset()


def test_windows_follow_the_family():
    assert tiny_spec("llama").sliding_windows == (None, None)
    assert tiny_spec("mistral", sliding_window=9).sliding_windows == (9, 9)
    assert tiny_spec("qwen2", sliding_window=9).sliding_windows == (None, None)
    qwen = tiny_spec("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert qwen.sliding_windows == (None, 9)


def test_flags_follow_the_family():
    qwen2, qwen3, phi3 = tiny_spec("qwen2"), tiny_spec("qwen3", head_dim=8), tiny_spec("phi3")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    assert (phi3.qkv_bias, phi3.is_fused) == (False, True)


def test_longrope_chooses_by_the_longest_sequence_to_serve():
    rope = tiny_spec("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=64).rope
    assert rope.frequencies(64) == rope.inv_freq
    assert rope.frequencies(65) == rope.long_inv_freq
    assert rope.inv_freq != rope.long_inv_freq
