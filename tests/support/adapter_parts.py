"""Adapters with every part there is, and a transformers model patched by hand as their oracle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import DynamicCache

from loraplex_memory import adapter_spec as parts
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair, PartKey
from loraplex_memory.layout import PROJECTIONS, SITES, Projection
from tests.support.tiny_models import SIZES, VOCAB

#: To be given to `tiny_config`: Qwen3's own would be larger.
HEAD_DIM: Final = 8
NUM_VIRTUAL: Final = 6
INVOCATION: Final = (3, 3)

_LAYERS: Final = range(2)
_HIDDEN: Final = 32
_TOKEN_IDS: Final = (3, 5, 60, 96)

Parts = dict[PartKey, torch.Tensor]


def make_adapters(reference: Any) -> dict[str, AdapterWeights]:
    """Return an adapter of each kind, half of them with LoRA as well, two plain ones, and an
    activated one, for a model of two layers and `HEAD_DIM`.
    """
    adapters = {
        "plain": AdapterWeights({(1, "up"): _pair(reference, 1, "up", 1)}),
        "other plain": AdapterWeights({(i, "up"): _pair(reference, i, "up", 5) for i in _LAYERS}),
        "activated": AdapterWeights(
            {(i, p): _pair(reference, i, p, i) for i in _LAYERS for p in ("q", "v", "down")},
            invocation_token_ids=INVOCATION,
        ),
    }
    for seed, (name, own) in enumerate(_make_parts(reference).items()):
        names = {part for part, _ in own}
        modules: list[tuple[int, Projection]] = [(0, "down"), (1, "up"), (1, "k")]
        adapters[name] = AdapterWeights(
            {(i, p): _pair(reference, i, p, seed) for i, p in modules} if seed % 2 else {},
            own,
            token_ids=_TOKEN_IDS if parts.TOKEN_ROWS in names else (),
            head_token_ids=_TOKEN_IDS if parts.HEAD_ROWS in names else (),
        )
    return adapters


def _make_parts(reference: Any) -> dict[str, Parts]:
    outs = {p: _linear(reference, 0, p).weight.shape[0] for p in PROJECTIONS}
    made: dict[str, Parts] = {
        "soft prompt": {(parts.SOFT_PROMPT, None): _noise(NUM_VIRTUAL, _HIDDEN)},
        "kv prefix": {
            (parts.KV_PREFIX, i): 2.0 * _noise(NUM_VIRTUAL, 2 * 2 * HEAD_DIM, seed=i)
            for i in _LAYERS
        },
        "norms": {
            **{(parts.INPUT_NORM, i): _near_one(_HIDDEN, seed=i) for i in _LAYERS},
            (parts.POST_NORM, 1): _near_one(_HIDDEN, seed=2),
            (parts.FINAL_NORM, None): _near_one(_HIDDEN, seed=3),
        },
        "scales and biases": {
            **{(parts.out_scale(p), i): _near_one(outs[p], seed=i) for p in outs for i in _LAYERS},
            **{(parts.bias(p), 1): _noise(1, outs[p], seed=2) for p in ("q", "o", "gate")},
        },
        "input scales": {
            **{(parts.in_scale("qkv"), i): _near_one(_HIDDEN, seed=i) for i in _LAYERS},
            (parts.in_scale("o"), 0): _near_one(4 * HEAD_DIM, seed=2),
            (parts.in_scale("gate_up"), 1): _near_one(_HIDDEN, seed=3),
            (parts.in_scale("down"), 0): _near_one(SIZES["intermediate_size"], seed=4),
        },
        "token rows": {
            (parts.TOKEN_ROWS, None): _noise(len(_TOKEN_IDS), _HIDDEN, seed=1),
            (parts.HEAD_ROWS, None): _noise(len(_TOKEN_IDS), _HIDDEN, seed=2),
        },
        "embedding lora": {
            (parts.EMBEDDING_A, None): _noise(VOCAB, 3, seed=1),
            (parts.EMBEDDING_B, None): _noise(3, _HIDDEN, seed=2),
            (parts.TOKEN_ROWS, None): _noise(len(_TOKEN_IDS), _HIDDEN, seed=3),
        },
        "head lora": {
            (parts.HEAD_A, None): _noise(5, _HIDDEN, seed=1),
            (parts.HEAD_B, None): _noise(5, VOCAB, seed=2),
        },
        "whole ends": {
            (parts.EMBEDDING, None): _noise(VOCAB, _HIDDEN, seed=1),
            (parts.HEAD, None): _noise(VOCAB, _HIDDEN, seed=2),
        },
    }
    if hasattr(reference.model.layers[0].self_attn, "q_norm"):
        made["head norms"] = {
            (parts.Q_NORM, 0): _near_one(HEAD_DIM, seed=1),
            (parts.K_NORM, 1): _near_one(HEAD_DIM, seed=2),
            (parts.Q_NORM, 1): _near_one(HEAD_DIM, seed=3),
        }
    return made


def _pair(reference: Any, layer: int, projection: Projection, seed: int) -> LoRAPair:
    out, width = _linear(reference, layer, projection).weight.shape
    return LoRAPair(_noise(3, width, seed=seed), _noise(out, 3, seed=seed + 1), 0.5)


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _near_one(width: int, seed: int) -> torch.Tensor:
    return 1.0 + _noise(1, width, seed=seed)


def _linear(model: Any, layer: int, projection: Projection) -> Any:
    block = model.model.layers[layer]
    module = block.self_attn if projection in "qkvo" else block.mlp
    return getattr(module, f"{projection}_proj")


@torch.inference_mode()
def expected_logits(
    reference: Any,
    weights: AdapterWeights | None,
    tokens: Sequence[int],
    num_prompt: int | None = None,
) -> torch.Tensor:
    """Return what a request of the adapter must get, float32 `[tokens, V]`.

    Args:
        reference: the transformers model; not changed.
        weights: None for the base.
        tokens: a prompt, and maybe what was generated behind it.
        num_prompt: how many of them are the prompt; all by default.
    """
    ids = torch.tensor([tokens])
    if weights is None:
        return reference(ids).logits[0]
    model = patched(reference, weights)
    if weights.invocation_token_ids:
        return _activated_logits(reference, model, ids, len(tokens[:num_prompt]))
    if (soft := weights.parts.get((parts.SOFT_PROMPT, None))) is not None:
        embedded = torch.cat((soft[None], model.model.embed_tokens(ids)), dim=1)
        return model(inputs_embeds=embedded).logits[0, NUM_VIRTUAL:]
    if (parts.KV_PREFIX, 0) not in weights.parts:
        return model(ids).logits[0]
    cache = DynamicCache()
    for layer in _LAYERS:
        kv = weights.parts[parts.KV_PREFIX, layer].view(1, NUM_VIRTUAL, 2, 2, HEAD_DIM)
        cache.update(*(kv[:, :, i].transpose(1, 2) for i in (0, 1)), layer)
    return model(ids, past_key_values=cache).logits[0]


def _activated_logits(base: Any, model: Any, ids: torch.Tensor, num_prompt: int) -> torch.Tensor:
    """The base up to the last invocation, the adapter from there on, over one cache."""
    prompt = ids[0, :num_prompt].tolist()
    starts = [i for i in range(num_prompt - 1) if tuple(prompt[i : i + 2]) == INVOCATION]
    if not starts:
        return base(ids).logits[0]
    cache = DynamicCache()
    logits = []
    if starts[-1]:
        logits.append(base(ids[:, : starts[-1]], past_key_values=cache).logits[0])
    logits.append(model(ids[:, starts[-1] :], past_key_values=cache).logits[0])
    return torch.cat(logits)


def patched(reference: Any, weights: AdapterWeights) -> Any:
    """Return a copy of the model with all done to its weights that can be done there."""
    model, own = copy.deepcopy(reference), weights.parts
    for index, block in enumerate(model.model.layers):
        for projection in PROJECTIONS:
            _patch_linear(_linear(model, index, projection), weights, index, projection)
        for name, norm in {
            parts.INPUT_NORM: block.input_layernorm,
            parts.POST_NORM: block.post_attention_layernorm,
            parts.Q_NORM: getattr(block.self_attn, "q_norm", None),
            parts.K_NORM: getattr(block.self_attn, "k_norm", None),
        }.items():
            if norm is not None and (name, index) in own:
                norm.weight.data = own[name, index][0]
    if (weight := own.get((parts.FINAL_NORM, None))) is not None:
        model.model.norm.weight.data = weight[0]
    _patch_ends(model, weights)
    return model


def _patch_linear(linear: Any, weights: AdapterWeights, layer: int, projection: Projection) -> None:
    own = weights.parts
    if (pair := weights.lora.get((layer, projection))) is not None:
        linear.weight.data += pair.scale * pair.b @ pair.a
    site = next(site for site, members in SITES.items() if projection in members)
    if (scale := own.get((parts.in_scale(site), layer))) is not None:
        linear.weight.data *= scale
    if (scale := own.get((parts.out_scale(projection), layer))) is not None:
        linear.weight.data *= scale.T
    if (bias := own.get((parts.bias(projection), layer))) is not None:
        assert linear.bias is None, "the tiny models of these tests have no biases"
        linear.bias = torch.nn.Parameter(bias[0])


def _patch_ends(model: Any, weights: AdapterWeights) -> None:
    own = weights.parts
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    if (whole := own.get((parts.EMBEDDING, None))) is not None:
        embedding.data = whole.clone()
    if (whole := own.get((parts.HEAD, None))) is not None:
        head.data = whole.clone()
    if (a := own.get((parts.EMBEDDING_A, None))) is not None:
        embedding.data += a @ own[parts.EMBEDDING_B, None]
    if (a := own.get((parts.HEAD_A, None))) is not None:
        head.data += own[parts.HEAD_B, None].T @ a
    if (rows := own.get((parts.TOKEN_ROWS, None))) is not None:
        embedding.data[list(weights.token_ids)] = rows
    if (rows := own.get((parts.HEAD_ROWS, None))) is not None:
        head.data[list(weights.head_token_ids)] = rows
