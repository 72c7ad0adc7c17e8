"""The parameters of a model in the fused layout that the forward pass reads.

`allocate` makes room for every parameter of a spec and `checkpoint_views` names each piece of it as
checkpoints do: filling those views, one tensor at a time, is loading. So no second copy of the
model ever exists, and a name left over on either side is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from loraplex_memory.layout import SITES, Projection
from loraplex_server.model.errors import CheckpointError
from loraplex_server.model.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

#: Buffers that old checkpoints carry and the spec already determines.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; `D` is the head size, `I` the intermediate size.

    Attributes:
        input_norm: `[H]`.
        qkv: `[(heads + 2 kv_heads) D, H]`; q, then k, then v.
        qkv_bias: `[(heads + 2 kv_heads) D]`.
        q_norm: `[D]`; with `k_norm`, for models with q/k norm.
        o: `[H, heads D]`, its bias `[H]`.
        post_norm: `[H]`, before the MLP.
        gate_up: `[2 I, H]`; gate, then up; its bias `[2 I]`.
        down: `[H, I]`, its bias `[H]`.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class ModelWeights:
    """All parameters, of one dtype on one device. `lm_head` is `embedding` itself where tied."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, tied ones once."""
        tensors = [self.embedding, self.norm]
        if self.lm_head is not self.embedding:
            tensors.append(self.lm_head)
        tensors += [t for layer in self.layers for t in vars(layer).values() if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str) -> ModelWeights:
    """Return uninitialised weights of the shapes that `spec` says."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    embedding = empty(spec.vocab_size, spec.geometry.hidden_size)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_allocate_layer(spec, dtype, device) for _ in range(spec.geometry.num_layers)),
        norm=empty(spec.geometry.hidden_size),
        lm_head=embedding if spec.tie_word_embeddings else empty(*embedding.shape),
    )


def _allocate_layer(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device | str
) -> LayerWeights:
    g = spec.geometry
    qkv_out = g.out_features("q") + g.out_features("k") + g.out_features("v")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return LayerWeights(
        input_norm=empty(g.hidden_size),
        qkv=empty(qkv_out, g.hidden_size),
        qkv_bias=empty(qkv_out) if spec.qkv_bias else None,
        q_norm=empty(g.head_dim) if spec.qk_norm else None,
        k_norm=empty(g.head_dim) if spec.qk_norm else None,
        o=empty(g.hidden_size, g.in_features("o")),
        o_bias=empty(g.hidden_size) if spec.o_bias else None,
        post_norm=empty(g.hidden_size),
        gate_up=empty(2 * g.intermediate_size, g.hidden_size),
        gate_up_bias=empty(2 * g.intermediate_size) if spec.mlp_bias else None,
        down=empty(g.hidden_size, g.intermediate_size),
        down_bias=empty(g.hidden_size) if spec.mlp_bias else None,
    )


def checkpoint_views(spec: ModelSpec, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Return every parameter under its checkpoint name, as views into `weights`."""
    views = {EMBEDDING: weights.embedding, FINAL_NORM: weights.norm}
    if not spec.tie_word_embeddings:
        views[LM_HEAD] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        for name, view in _layer_views(spec, layer):
            views[f"model.layers.{index}.{name}"] = view
    return views


def _layer_views(spec: ModelSpec, layer: LayerWeights) -> Iterator[tuple[str, torch.Tensor]]:
    g = spec.geometry
    qkv = {p: g.out_features(p) for p in SITES["qkv"]}
    gate_up = {p: g.out_features(p) for p in SITES["gate_up"]}
    yield "input_layernorm.weight", layer.input_norm
    if spec.is_fused:
        yield from _linear_views("self_attn.qkv_proj", layer.qkv, layer.qkv_bias)
        yield from _linear_views("mlp.gate_up_proj", layer.gate_up, layer.gate_up_bias)
    else:
        yield from _split_views("self_attn", qkv, layer.qkv, layer.qkv_bias)
        yield from _split_views("mlp", gate_up, layer.gate_up, layer.gate_up_bias)
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    yield from _linear_views("self_attn.o_proj", layer.o, layer.o_bias)
    yield "post_attention_layernorm.weight", layer.post_norm
    yield from _linear_views("mlp.down_proj", layer.down, layer.down_bias)


def _linear_views(
    name: str, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", weight
    if bias is not None:
        yield f"{name}.bias", bias


def _split_views(
    block: str, rows: Mapping[Projection, int], weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name the rows of each projection inside a fused linear."""
    start = 0
    for projection, count in rows.items():
        part = slice(start, start + count)
        part_bias = None if bias is None else bias[part]
        yield from _linear_views(f"{block}.{projection}_proj", weight[part], part_bias)
        start += count


@torch.inference_mode()
def fill_weights(
    spec: ModelSpec,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    path: str = "(memory)",
) -> ModelWeights:
    """Load `(checkpoint name, tensor)` pairs, each used and dropped in turn.

    Args:
        spec: says which parameters there must be.
        tensors: all of the checkpoint; dtypes float32, bfloat16 or float16.
        dtype: of the result; float32 or bfloat16.
        path: where the tensors come from, for messages.

    Raises:
        CheckpointError: a tensor is unknown, missing, twice there, or of a wrong shape or dtype.
    """
    weights = allocate(spec, dtype, device)
    views = checkpoint_views(spec, weights)
    unknown, misshapen = [], []
    tied_head: torch.Tensor | None = None
    for name, tensor in tensors:
        if name == LM_HEAD and spec.tie_word_embeddings:
            tied_head = tensor
        elif (view := views.pop(name, None)) is None:
            unknown += [] if name.endswith(_IGNORED_SUFFIXES) else [name]
        elif tensor.shape != view.shape or tensor.dtype not in _DTYPES:
            expected = f"expected {tuple(view.shape)}"
            misshapen.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} ({expected})")
        else:
            view.copy_(tensor)
    _refuse(path, "tensors the model has no place for", unknown)
    _refuse(path, "tensors of a wrong shape or dtype", misshapen)
    _refuse(path, "missing tensors", list(views))
    if tied_head is not None and not torch.equal(tied_head.to(weights.embedding), weights.lm_head):
        _refuse(path, "tie_word_embeddings is set, yet the head is not the embedding", [LM_HEAD])
    return weights


def _refuse(path: str, reason: str, names: list[str]) -> None:
    if names:
        raise CheckpointError(path=path, reason=reason, tensors=names)


def random_weights(
    spec: ModelSpec, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return a random checkpoint of `spec`, by name, for tests and benchmarks.

    Linears and embeddings are normal with deviation 0.02 (transformers' initialisation), norms
    close to 1, biases small and not zero.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, view in checkpoint_views(spec, allocate(spec, dtype, "meta")).items():
        value = torch.randn(view.shape, generator=generator).mul_(0.02)
        if name.endswith("norm.weight"):
            value += 1.0
        state[name] = value.to(dtype)
    return state
