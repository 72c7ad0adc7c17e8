"""Output scales and biases beside plain LoRA and the base, against a patched transformers model."""

from __future__ import annotations

import copy

import pytest
import torch

from loraplex_memory.adapter_spec import bias, out_scale
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS
from tests.support.served import ServedModel, served_logits
from tests.support.tiny_models import VOCAB, tiny_config, tiny_reference, transformer_of

PROMPTS = [[5, 9, 11, 4, 60, 33, 8], [12], [90, 3, 3, 41, 7, 20, 19, 18, 6]]


@pytest.fixture(name="reference", scope="module")
def _reference():
    return tiny_reference(tiny_config())


def linear_of(model, layer, projection):
    block = model.model.layers[layer]
    part = block.self_attn if projection in "qkvo" else block.mlp
    return getattr(part, f"{projection}_proj")


def random_weights(reference, *, has_pairs, has_scale, has_bias, seed=0, only=PROJECTIONS):
    """Return an adapter of random scales, biases and pairs of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    lora, parts = {}, {}
    for layer in range(2):
        for p in only:
            out, width = linear_of(reference, layer, p).weight.shape
            if has_pairs:
                a = torch.randn(3, width, generator=generator) * 0.2
                b = torch.randn(out, 3, generator=generator) * 0.2
                lora[layer, p] = LoRAPair(a, b, 0.7)
            if has_scale:
                parts[out_scale(p), layer] = 1 + 0.3 * torch.randn(1, out, generator=generator)
            if has_bias:
                parts[bias(p), layer] = 0.3 * torch.randn(1, out, generator=generator)
    return AdapterWeights(lora, parts)


def patched(reference, weights):
    """Return a copy whose linears compute `scale * (W x + s B A x) + bias`."""
    model = copy.deepcopy(reference)
    for layer in range(2):
        for p in PROJECTIONS:
            linear = linear_of(model, layer, p)
            if pair := weights.lora.get((layer, p)):
                linear.weight.data += pair.scale * pair.b @ pair.a
            if (scale := weights.parts.get((out_scale(p), layer))) is not None:
                linear.weight.data *= scale.T
            if (shift := weights.parts.get((bias(p), layer))) is not None:
                linear.bias = torch.nn.Parameter(shift[0])
    return model


@torch.inference_mode()
def assert_served(reference, adapters):
    """Serve three prompts of the base and of each adapter at once."""
    prompts = [(name, p) for p in PROMPTS for name in (None, *adapters)]
    models = {None: reference, **{name: patched(reference, w) for name, w in adapters.items()}}
    for (name, prompt), ours in zip(
        prompts, served_logits(reference, adapters, prompts), strict=True
    ):
        theirs = models[name](torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
        assert ours.shape == (len(prompt), VOCAB)


def test_scales_biases_and_pairs_in_one_batch_equal_their_patched_models(reference):
    adapters = {
        "plain": random_weights(reference, has_pairs=True, has_scale=False, has_bias=False),
        "dora": random_weights(reference, has_pairs=True, has_scale=True, has_bias=False, seed=1),
        "ia3": random_weights(
            reference, has_pairs=False, has_scale=True, has_bias=False, seed=2, only=("k", "v")
        ),
        "bias": random_weights(reference, has_pairs=False, has_scale=False, has_bias=True, seed=3),
        "all": random_weights(reference, has_pairs=True, has_scale=True, has_bias=True, seed=4),
    }
    assert_served(reference, adapters)


def test_a_scale_of_one_layer_leaves_the_other_alone(reference):
    weights = random_weights(reference, has_pairs=False, has_scale=True, has_bias=True)
    first = {key: part for key, part in weights.parts.items() if key[1] == 1}
    assert_served(reference, {"one layer": AdapterWeights(parts=first)})


@torch.inference_mode()
def test_scales_near_one_cost_no_accuracy_in_bfloat16(reference):
    """A pool of bfloat16 is no further from float32 than a model that has the scale merged."""
    rounded = copy.deepcopy(reference).bfloat16().float()
    adapters = {}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        drawn = random_weights(reference, has_pairs=False, has_scale=True, has_bias=False).parts
        parts = {k: 1 + 0.03 * torch.randn(v.shape, generator=generator) for k, v in drawn.items()}
        adapters[str(seed)] = AdapterWeights(parts=parts)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        (n, torch.randint(VOCAB, (24,), generator=generator)) for n in adapters for _ in range(8)
    ]
    served = ServedModel(transformer_of(rounded, dtype=torch.bfloat16), adapters)
    ours, theirs = [], []
    for (name, prompt), logits in zip(
        prompts, served.logits([(n, p.tolist()) for n, p in prompts]), strict=True
    ):
        exact = patched(rounded, adapters[name])
        expected = exact(prompt[None]).logits[0]
        ours.append((logits - expected).square().mean())
        merged = exact.bfloat16()(prompt[None]).logits[0].float()
        theirs.append((merged - expected).square().mean())
    assert torch.stack(ours).mean().sqrt() < 1.03 * torch.stack(theirs).mean().sqrt()
