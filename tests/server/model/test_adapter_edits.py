"""Every part of adapters against a transformers model patched by hand, in one mixed batch."""

from __future__ import annotations

import copy

import pytest
import torch

from loraplex_memory import adapter_spec as parts
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from tests.support.served import ServedModel, served_logits
from tests.support.tiny_models import VOCAB, tiny_config, tiny_reference, transformer_of

PROMPTS = [[5, 9, 11, 4, 60, 33, 8, 5], [12], [90, 3, 3, 41, 7, 20, 19, 18, 6]]
TOKEN_IDS = (3, 5, 60, 96)
HIDDEN, HEAD_DIM, NUM_VIRTUAL = 32, 8, 6


@pytest.fixture(params=["llama", "qwen3"], name="reference", scope="module")
def _reference(request):
    return tiny_reference(tiny_config(request.param, head_dim=HEAD_DIM))


def rand(*shape, seed=0, scale=0.4):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_like(*shape, seed=0):
    return 1.0 + rand(*shape, seed=seed)


def make_parts():
    """Return the parts of adapters, each by a name."""
    layers = range(2)
    return {
        "soft prompt": {(parts.SOFT_PROMPT, None): rand(NUM_VIRTUAL, HIDDEN)},
        "kv prefix": {
            (parts.KV_PREFIX, layer): rand(NUM_VIRTUAL, 2 * 2 * HEAD_DIM, seed=layer, scale=1.0)
            for layer in layers
        },
        "norms": {
            **{(parts.INPUT_NORM, layer): norm_like(1, HIDDEN, seed=layer) for layer in layers},
            (parts.POST_NORM, 1): norm_like(1, HIDDEN, seed=2),
            (parts.FINAL_NORM, None): norm_like(1, HIDDEN, seed=3),
        },
        "input scales": {
            **{(parts.in_scale("qkv"), layer): norm_like(1, 32, seed=layer) for layer in layers},
            (parts.in_scale("o"), 0): norm_like(1, 32, seed=2),
            (parts.in_scale("gate_up"), 1): norm_like(1, 32, seed=3),
            (parts.in_scale("down"), 0): norm_like(1, 48, seed=4),
        },
        "tokens": {
            (parts.TOKEN_ROWS, None): rand(len(TOKEN_IDS), HIDDEN, seed=1),
            (parts.HEAD_ROWS, None): rand(len(TOKEN_IDS), HIDDEN, seed=2),
        },
        "embedding lora": {
            (parts.EMBEDDING_A, None): rand(VOCAB, 3, seed=1),
            (parts.EMBEDDING_B, None): rand(3, HIDDEN, seed=2),
            (parts.TOKEN_ROWS, None): rand(len(TOKEN_IDS), HIDDEN, seed=3),
        },
        "head lora": {
            (parts.HEAD_A, None): rand(5, HIDDEN, seed=1),
            (parts.HEAD_B, None): rand(5, VOCAB, seed=2),
        },
        "dense": {
            (parts.EMBEDDING, None): rand(VOCAB, HIDDEN, seed=1),
            (parts.HEAD, None): rand(VOCAB, HIDDEN, seed=2),
        },
    }


def make_adapters(reference):
    """Return an adapter of each kind, half of them with a LoRA pair as well, and a plain one."""
    made = make_parts()
    if reference.config.model_type == "qwen3":
        made["head norms"] = {
            (parts.Q_NORM, 0): norm_like(1, HEAD_DIM, seed=1),
            (parts.K_NORM, 1): norm_like(1, HEAD_DIM, seed=2),
            (parts.Q_NORM, 1): norm_like(1, HEAD_DIM, seed=3),
        }
    adapters = {"plain": AdapterWeights({(1, "up"): pair(1)})}
    for seed, (name, own) in enumerate(made.items()):
        names = {part for part, _ in own}
        adapters[name] = AdapterWeights(
            {(0, "down"): pair(seed, 32, 48), (1, "up"): pair(seed)} if seed % 2 else {},
            own,
            token_ids=TOKEN_IDS if parts.TOKEN_ROWS in names else (),
            head_token_ids=TOKEN_IDS if parts.HEAD_ROWS in names else (),
        )
    return adapters


def pair(seed, out=48, width=32):
    return LoRAPair(rand(3, width, seed=seed), rand(out, 3, seed=seed + 1), 0.5)


def patched(reference, weights):
    """Return a copy of the model with everything done to it that can be done to its weights."""
    model = copy.deepcopy(reference)
    for (layer, p), lora in weights.lora.items():
        getattr(model.model.layers[layer].mlp, f"{p}_proj").weight.data += (
            lora.scale * lora.b @ lora.a
        )
    own = weights.parts
    norms = {
        parts.INPUT_NORM: lambda block: block.input_layernorm,
        parts.POST_NORM: lambda block: block.post_attention_layernorm,
        parts.Q_NORM: lambda block: block.self_attn.q_norm,
        parts.K_NORM: lambda block: block.self_attn.k_norm,
    }
    linears = {
        "qkv": lambda block: [getattr(block.self_attn, f"{p}_proj") for p in "qkv"],
        "o": lambda block: [block.self_attn.o_proj],
        "gate_up": lambda block: [block.mlp.gate_proj, block.mlp.up_proj],
        "down": lambda block: [block.mlp.down_proj],
    }
    for index, block in enumerate(model.model.layers):
        for name, find in norms.items():
            if (weight := own.get((name, index))) is not None:
                find(block).weight.data = weight[0]
        for site, find in linears.items():
            if (scale := own.get((parts.in_scale(site), index))) is not None:
                for linear in find(block):
                    linear.weight.data *= scale
    if (weight := own.get((parts.FINAL_NORM, None))) is not None:
        model.model.norm.weight.data = weight[0]
    patch_ends(model, weights)
    return model


def patch_ends(model, weights):
    """Change embedding and head."""
    own = weights.parts
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    for matrix, dense, a, b in (
        (embedding, parts.EMBEDDING, parts.EMBEDDING_A, parts.EMBEDDING_B),
        (head, parts.HEAD, parts.HEAD_A, parts.HEAD_B),
    ):
        if (weight := own.get((dense, None))) is not None:
            matrix.data = weight.clone()
        if (first := own.get((a, None))) is not None:
            second = own[b, None]
            matrix.data += first @ second if matrix is embedding else second.T @ first
    if (rows := own.get((parts.TOKEN_ROWS, None))) is not None:
        embedding.data[list(weights.token_ids)] = rows
    if (rows := own.get((parts.HEAD_ROWS, None))) is not None:
        head.data[list(weights.head_token_ids)] = rows


@torch.inference_mode()
def expected(reference, weights, prompt):
    """Return the logits of a prompt, `[tokens, V]`, from the patched model."""
    from transformers import DynamicCache

    model = patched(reference, weights)
    ids = torch.tensor([prompt])
    if (soft := weights.parts.get((parts.SOFT_PROMPT, None))) is not None:
        embedded = torch.cat((soft[None], model.model.embed_tokens(ids)), dim=1)
        return model(inputs_embeds=embedded).logits[0, NUM_VIRTUAL:]
    if (parts.KV_PREFIX, 0) not in weights.parts:
        return model(ids).logits[0]
    cache = DynamicCache()
    for layer in range(2):
        kv = weights.parts[parts.KV_PREFIX, layer].view(1, NUM_VIRTUAL, 2, 2, HEAD_DIM)
        cache.update(*(kv[:, :, i].transpose(1, 2) for i in (0, 1)), layer)
    mask = torch.ones(1, NUM_VIRTUAL + len(prompt), dtype=torch.int64)
    return model(ids, past_key_values=cache, attention_mask=mask).logits[0]


@torch.inference_mode()
def test_all_parts_in_one_batch_equal_their_patched_models(reference):
    adapters = make_adapters(reference)
    prompts = [(name, p) for p in PROMPTS for name in (None, *adapters)]
    base = [reference(torch.tensor([p])).logits[0] for p in PROMPTS]
    logits = served_logits(reference, adapters, prompts)
    for ours, (name, prompt) in zip(logits, prompts, strict=True):
        plain = base[PROMPTS.index(prompt)]
        theirs = plain if name is None else expected(reference, adapters[name], prompt)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
        if name not in (None, "plain") and len(prompt) > 1:
            assert (theirs - plain).abs().max() > 0.1, f"{name} changes nothing"


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
