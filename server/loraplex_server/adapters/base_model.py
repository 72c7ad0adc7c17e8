"""The base model as conversions need it: its shape, and single tensors of it in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from loraplex_memory.layout import ModelGeometry, Projection
from loraplex_server.model.checkpoint import open_checkpoint
from loraplex_server.model.source import ModelSource
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.weights import EMBEDDING, LM_HEAD

#: `projection -> (linear that holds it in a fused checkpoint, the projections in it in row order)`.
_FUSED: Mapping[Projection, tuple[str, tuple[Projection, ...]]] = {
    "q": ("self_attn.qkv_proj", ("q", "k", "v")),
    "k": ("self_attn.qkv_proj", ("q", "k", "v")),
    "v": ("self_attn.qkv_proj", ("q", "k", "v")),
    "gate": ("mlp.gate_up_proj", ("gate", "up")),
    "up": ("mlp.gate_up_proj", ("gate", "up")),
}
_BLOCKS: Mapping[Projection, str] = {
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "o": "self_attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


class TensorSource(Protocol):
    """Tensors by their names in a checkpoint."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; raises KeyError."""
        ...


class StateDict:
    """A source in memory, for tests and for models that were never saved."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class BaseModel:
    """The served base, read from its files only when a conversion asks; safe from any thread.

    Holds no tensor: conversions of one adapter walk through the layers once, and the operating
    system keeps the pages of the files.
    """

    def __init__(self, spec: ModelSpec, tensors: TensorSource) -> None:
        self.spec = spec
        self._tensors = tensors

    @classmethod
    def open(cls, source: ModelSource, spec: ModelSpec) -> BaseModel:
        """Return the model in the files of `source`; reads nothing yet."""
        return cls(spec, open_checkpoint(source, spec))

    @property
    def geometry(self) -> ModelGeometry:
        return self.spec.geometry

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def tie_word_embeddings(self) -> bool:
        return self.spec.tie_word_embeddings

    @property
    def has_qk_norm(self) -> bool:
        return self.spec.qk_norm

    def has_bias(self, projection: Projection) -> bool:
        """Whether the base adds a bias to the output of the projection."""
        if projection in ("q", "k", "v"):
            return self.spec.qkv_bias
        return self.spec.o_bias if projection == "o" else self.spec.mlp_bias

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor as float32, by its checkpoint name.

        Linears have both their own name and that of the fused linear (`qkv_proj`, `gate_up_proj`),
        however the checkpoint stores them. A tied `lm_head.weight` is the embedding.

        Raises:
            KeyError: the base has no such tensor.
            CheckpointError: the files are damaged.
        """
        if name == LM_HEAD and self.tie_word_embeddings:
            name = EMBEDDING
        parts = name.split(".")
        if len(parts) == 6 and parts[:2] == ["model", "layers"] and parts[4].endswith("_proj"):
            return self._linear_tensor(int(parts[2]), ".".join(parts[3:5]), parts[5])
        return self._tensors.read(name).to(torch.float32)

    def weight(self, layer: int, projection: Projection) -> torch.Tensor:
        """Return a projection's weight `[out, in]`, float32."""
        return self.tensor(f"model.layers.{layer}.{_module(projection)}.weight")

    def bias(self, layer: int, projection: Projection) -> torch.Tensor | None:
        """Return a projection's bias `[out]`, float32, where the base has one."""
        if not self.has_bias(projection):
            return None
        return self.tensor(f"model.layers.{layer}.{_module(projection)}.bias")

    def _linear_tensor(self, layer: int, module: str, kind: str) -> torch.Tensor:
        """Return `weight` or `bias` of a linear, joined or cut where the checkpoint differs."""
        stem = f"model.layers.{layer}"
        fused = next((parts for name, parts in _FUSED.values() if name == module), None)
        if fused is not None and not self.spec.is_fused:
            return torch.cat([self.tensor(f"{stem}.{_module(p)}.{kind}") for p in fused])
        own = next((p for p in _FUSED if _module(p) == module), None)
        if own is None or not self.spec.is_fused:
            return self._tensors.read(f"{stem}.{module}.{kind}").to(torch.float32)
        name, members = _FUSED[own]
        rows = [self.geometry.out_features(p) for p in members]
        whole = self._tensors.read(f"{stem}.{name}.{kind}").to(torch.float32)
        return torch.split(whole, rows)[members.index(own)]


def _module(projection: Projection) -> str:
    return f"{_BLOCKS[projection]}.{projection}_proj"
