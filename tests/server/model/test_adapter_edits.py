"""Every part of adapters against a transformers model patched by hand, in one mixed batch."""

from __future__ import annotations

import pytest
import torch

from tests.support.adapter_parts import HEAD_DIM, expected_logits, make_adapters
from tests.support.served import ServedModel, served_logits
from tests.support.tiny_models import tiny_config, tiny_reference, transformer_of

PROMPTS = [[5, 9, 11, 4, 60, 33, 8, 5], [12], [90, 3, 3, 41, 7, 20, 3, 3, 6], [3, 3, 8]]


@pytest.fixture(params=["llama", "qwen3"], name="reference", scope="module")
def _reference(request):
    return tiny_reference(tiny_config(request.param, head_dim=HEAD_DIM))


def test_all_parts_in_one_batch_equal_their_patched_models(reference):
    adapters = make_adapters(reference)
    prompts = [(name, p) for p in PROMPTS for name in (None, *adapters)]
    for ours, (name, prompt) in zip(
        served_logits(reference, adapters, prompts), prompts, strict=True
    ):
        theirs = expected_logits(reference, adapters.get(name), prompt)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_every_adapter_changes_the_logits(reference):
    adapters = make_adapters(reference)
    prompt = PROMPTS[2]
    base = expected_logits(reference, None, prompt)
    for name, weights in adapters.items():
        effect = (expected_logits(reference, weights, prompt) - base).abs()
        assert effect.max() > 0.1, name
        if name == "activated":
            assert effect[:6].max() < 1e-4 < effect[6].max()


def test_a_rows_logits_are_the_same_to_the_last_bit_in_any_company(reference):
    adapters = make_adapters(reference)
    served = ServedModel(transformer_of(reference), adapters, num_kv_pages=1024)
    prompts = [(name, p) for p in PROMPTS for name in (None, *adapters)]
    together = served.logits(prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        assert torch.equal(served.logits([prompt])[0], logits), prompt


def test_bfloat16_parts_stay_close_to_float32(reference):
    adapters = make_adapters(reference)
    prompts = [(name, PROMPTS[0]) for name in (None, *adapters)]
    exact = served_logits(reference, adapters, prompts)
    rough = ServedModel(transformer_of(reference, dtype=torch.bfloat16), adapters).logits(prompts)
    for ours, theirs in zip(rough, exact, strict=True):
        assert (ours - theirs).abs().mean() < 0.05 * theirs.std()
