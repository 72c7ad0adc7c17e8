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
from loraplex_server.model.linear import Linear, Quantization
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
        q_norm: `[D]`; with `k_norm`, for models with q/k norm.
        o: `[H, heads D]`.
        post_norm: `[H]`, before the MLP.
        gate_up: `[2 I, H]`; gate, then up.
        down: `[H, I]`.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class ModelWeights:
    """All parameters, of one dtype on one device, but for linears rounded to int8.

    A tied `lm_head` is filled from `embedding`; once packed it is a second copy, as looking rows
    up needs the plain layout.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: Linear

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def is_int8(self) -> bool:
        """Whether the linears were rounded to int8."""
        return self.lm_head.is_int8

    @property
    def linears(self) -> tuple[Linear, ...]:
        return *(linear for layer in self.layers for linear in layer.linears), self.lm_head


class _Allocator:
    """Uninitialised parameters of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype = dtype
        self._device = device

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def linear(self, out_features: int, in_features: int, has_bias: bool = False) -> Linear:
        bias = self.tensor(out_features) if has_bias else None
        return Linear(self.tensor(out_features, in_features), bias)


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str) -> ModelWeights:
    """Return uninitialised, unpacked weights of the shapes that `spec` says."""
    new = _Allocator(dtype, device)
    hidden = spec.geometry.hidden_size
    embedding = new.tensor(spec.vocab_size, hidden)
    is_tied = spec.tie_word_embeddings
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_allocate_layer(spec, new) for _ in range(spec.geometry.num_layers)),
        norm=new.tensor(hidden),
        lm_head=Linear(embedding) if is_tied else new.linear(spec.vocab_size, hidden),
    )


def _allocate_layer(spec: ModelSpec, new: _Allocator) -> LayerWeights:
    g = spec.geometry
    qkv_out = sum(g.out_features(p) for p in SITES["qkv"])
    return LayerWeights(
        input_norm=new.tensor(g.hidden_size),
        qkv=new.linear(qkv_out, g.hidden_size, spec.qkv_bias),
        q_norm=new.tensor(g.head_dim) if spec.qk_norm else None,
        k_norm=new.tensor(g.head_dim) if spec.qk_norm else None,
        o=new.linear(g.hidden_size, g.in_features("o"), spec.o_bias),
        post_norm=new.tensor(g.hidden_size),
        gate_up=new.linear(2 * g.intermediate_size, g.hidden_size, spec.mlp_bias),
        down=new.linear(g.hidden_size, g.intermediate_size, spec.mlp_bias),
    )


def checkpoint_views(spec: ModelSpec, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Return every parameter under its checkpoint name: views into unpacked `weights`."""
    views = {EMBEDDING: weights.embedding, FINAL_NORM: weights.norm}
    if not spec.tie_word_embeddings:
        views[LM_HEAD] = weights.lm_head.weight
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
        yield from _linear_views("self_attn.qkv_proj", layer.qkv)
        yield from _linear_views("mlp.gate_up_proj", layer.gate_up)
    else:
        yield from _split_views("self_attn", qkv, layer.qkv)
        yield from _split_views("mlp", gate_up, layer.gate_up)
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    yield from _linear_views("self_attn.o_proj", layer.o)
    yield "post_attention_layernorm.weight", layer.post_norm
    yield from _linear_views("mlp.down_proj", layer.down)


def _linear_views(name: str, linear: Linear) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", linear.weight
    if linear.bias is not None:
        yield f"{name}.bias", linear.bias


def _split_views(
    block: str, rows: Mapping[Projection, int], linear: Linear
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name the rows of each projection inside a fused linear."""
    start = 0
    for projection, count in rows.items():
        part = slice(start, start + count)
        bias = None if linear.bias is None else linear.bias[part]
        view = Linear(linear.weight[part], bias)
        yield from _linear_views(f"{block}.{projection}_proj", view)
        start += count


@torch.inference_mode()
def fill_weights(
    spec: ModelSpec,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    path: str = "(memory)",
) -> ModelWeights:
    """Load `(checkpoint name, tensor)` pairs, each used and dropped in turn, and pack the linears.

    Args:
        spec: says which parameters there must be.
        tensors: all of the checkpoint; dtypes float32, bfloat16 or float16.
        dtype: of the result; float32 or bfloat16.
        quantization: `int8` rounds the weight of every linear, the head's too; the embedding that
            a tied head is filled from stays as it is.
        path: where the tensors come from, for messages.

    Raises:
        UnsupportedModel: this machine, or the model, has a linear that int8 is not for.
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
    embedding = weights.embedding
    if tied_head is not None and not torch.equal(tied_head.to(embedding), embedding):
        _refuse(path, "tie_word_embeddings is set, yet the head is not the embedding", [LM_HEAD])
    views.clear()
    for linear in weights.linears:
        linear.pack(is_int8=quantization == "int8")
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
