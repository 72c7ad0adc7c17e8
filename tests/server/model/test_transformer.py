"""Every family against transformers: logits of prefill, chunked prefill and decode, in float32."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loraplex_kernels.native import load_native
from loraplex_server.model.linear import can_pack
from loraplex_server.model.transformer import Transformer
from loraplex_server.model.weights import fill_weights
from tests.server.model.paged_run import PagedRun
from tests.support.tiny_models import (
    LLAMA3_ROPE,
    LONG_ROPE,
    VOCAB,
    YARN_ROPE,
    state_of,
    tiny_config,
    tiny_reference,
    tiny_transformer,
    transformer_of,
)

LENGTH = 40
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    ),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 6}),
    "phi3-partial-rotary": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64},
    ),
}


@pytest.fixture(params=CASES, name="reference")
def _reference(request):
    family, options = CASES[request.param]
    return tiny_reference(tiny_config(family, **options))


def tokens_of(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.manual_seed(seed)).tolist()


@torch.inference_mode()
def reference_logits(reference, tokens: list[int]) -> torch.Tensor:
    return reference(torch.tensor([tokens])).logits[0]


def assert_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def short_regime(reference) -> int | None:
    """Return a `max_model_len` within the short regime of longrope."""
    rope = reference.config.rope_parameters
    return 64 if rope["rope_type"] == "longrope" else None


def test_prefill_gives_the_logits_of_transformers(reference):
    run = PagedRun(transformer_of(reference, max_model_len=short_regime(reference)))
    tokens = tokens_of(1)
    assert_logits(run.step({"a": tokens})["a"], reference_logits(reference, tokens))


def test_chunks_and_single_tokens_give_the_logits_of_one_prefill(reference):
    run = PagedRun(transformer_of(reference, max_model_len=short_regime(reference)))
    tokens = tokens_of(2)
    bounds = [0, 5, 6, 7, 20, 21, 22, 23, 34, *range(35, LENGTH + 1)]
    parts = [run.step({"a": tokens[start:stop]})["a"] for start, stop in pairwise(bounds)]
    assert_logits(torch.cat(parts), reference_logits(reference, tokens))


def test_sequences_in_one_step_do_not_see_each_other(reference):
    run = PagedRun(transformer_of(reference, max_model_len=short_regime(reference)))
    sequences = {name: tokens_of(seed) for seed, name in enumerate("abcd")}
    run.step({name: tokens[:-3] for name, tokens in sequences.items() if name != "d"})
    mixed = {name: tokens[-3:-2] for name, tokens in sequences.items() if name != "d"}
    logits = run.step({**mixed, "d": sequences["d"]})
    for name, tokens in sequences.items():
        seen = tokens if name == "d" else tokens[:-2]
        expected = reference_logits(reference, seen)[-len(logits[name]) :]
        assert_logits(logits[name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_decode_logits_are_bit_identical_alone_and_in_company(dtype, quantization):
    if quantization == "int8" and load_native() is None:
        pytest.skip("no C compiler")
    model = tiny_transformer(
        "llama", hidden_size=96, intermediate_size=1536, dtype=dtype, quantization=quantization
    )
    if not all(can_pack(torch.empty(0, dtype=d)) for d in (torch.float32, dtype)):
        pytest.skip("plain linears sum in an order that depends on the number of rows")
    sequences = {name: tokens_of(seed, 9 + 3 * seed) for seed, name in enumerate("abcdef")}
    together = decode_steps(model, sequences)
    for name, tokens in sequences.items():
        assert torch.equal(decode_steps(model, {name: tokens})[name], together[name])


@pytest.mark.parametrize("num_threads", [2, 16])
def test_threads_that_come_late_change_nothing(num_threads):
    """Sixteen threads share fewer cores: most find phases over that they never began."""
    model = tiny_transformer()
    sequences = {name: tokens_of(seed, 40) for seed, name in enumerate("abcdef")}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = PagedRun(model, num_pages=128).step(sequences)
        torch.set_num_threads(num_threads)
        for _ in range(20):
            together = PagedRun(model, num_pages=128).step(sequences)
            assert all(torch.equal(together[name], alone[name]) for name in sequences)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(load_native() is None, reason="no C compiler")
def test_an_int8_model_computes_its_rounded_weights():
    """What it gives is what a plain model gives that was loaded with those weights."""
    options = {"hidden_size": 64, "tie_word_embeddings": False}
    rounded = tiny_transformer(quantization="int8", **options)
    spec, weights = rounded.spec, rounded._weights
    state = {name: view.float() for name, view in state_of(spec, weights).items()}
    plain = Transformer(spec, fill_weights(spec, state.items(), dtype=torch.float32))
    tokens = tokens_of(3)
    logits = PagedRun(rounded).step({"a": tokens})["a"]
    assert_logits(logits, PagedRun(plain).step({"a": tokens})["a"])
    exact = PagedRun(tiny_transformer(**options)).step({"a": tokens})["a"]
    assert not torch.allclose(logits, exact, atol=1e-4)
    assert (rounded.precision, plain.precision) == ("float32 with int8 weights", "float32")


def decode_steps(model, sequences: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Prefill each sequence on its own but for three tokens, and decode those in one batch."""
    run = PagedRun(model)
    for name, tokens in sequences.items():
        run.step({name: tokens[:-3]})
    steps = [
        run.step({n: tokens[i : i + 1 or None] for n, tokens in sequences.items()})
        for i in (-3, -2, -1)
    ]
    return {name: torch.cat([step[name] for step in steps]) for name in sequences}
