"""Base models, and adapters over them: sizes only.

S1 .. S6 are the settings of S-LoRA (arXiv 2311.03285, table 2): a base model and the ranks of its
adapters in turn, on q, k, v and o. S3 is Llama-13B with rank 16 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from loraplex_memory.adapter_spec import AdapterRanks
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, Projection
from loraplex_server.simulator.errors import SimulationError

ELEM_BYTES: Final = 2
ATTENTION: Final[tuple[Projection, ...]] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class SimulatedModel:
    """A decoder with 16-bit weights."""

    name: str
    geometry: ModelGeometry
    vocab_size: int

    @cached_property
    def layer_params(self) -> int:
        """Weights of the linears, all layers: what every token is multiplied with."""
        g = self.geometry
        return g.num_layers * sum(g.in_features(p) * g.out_features(p) for p in PROJECTIONS)

    @property
    def head_params(self) -> int:
        """Weights of the output layer, which only sampled rows pass."""
        return self.vocab_size * self.geometry.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes in memory: linears, output layer and embeddings."""
        return ELEM_BYTES * (self.layer_params + 2 * self.head_params)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return ELEM_BYTES * self.geometry.num_layers * self.geometry.kv_elems_per_token


@dataclass(frozen=True)
class AdapterSet:
    """Adapter j has rank `ranks[j % len(ranks)]` on every one of `targets`."""

    ranks: tuple[int, ...]
    targets: tuple[Projection, ...] = ATTENTION

    def rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    def layer_ranks(self, adapter: int, num_layers: int) -> AdapterRanks:
        """Return the ranks per layer and projection, as manifests have them."""
        rank = self.rank(adapter)
        return (tuple(rank if p in self.targets else 0 for p in PROJECTIONS),) * num_layers


def llama(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int = 32000,
) -> SimulatedModel:
    """Return a model of the Llama family."""
    geometry = ModelGeometry(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
    )
    return SimulatedModel(name, geometry, vocab)


# S-LoRA's 70B runs are of Llama-2-70B, whose attention is grouped; the others have one K and V per
# head.
MODELS: Final = {
    "llama-7b": llama("llama-7b", 32, 4096, 32, 32, 11008),
    "llama-13b": llama("llama-13b", 40, 5120, 40, 40, 13824),
    "llama-30b": llama("llama-30b", 60, 6656, 52, 52, 17920),
    "llama-70b": llama("llama-70b", 80, 8192, 64, 8, 28672),
    "llama-3-8b": llama("llama-3-8b", 32, 4096, 32, 8, 14336, vocab=128256),
}


@dataclass(frozen=True)
class Setting:
    """A base model and the adapters over it."""

    name: str
    model: SimulatedModel
    adapters: AdapterSet


def _setting(name: str, model: str, *ranks: int) -> Setting:
    return Setting(name, MODELS[model], AdapterSet(ranks))


SETTINGS: Final = {
    setting.name: setting
    for setting in (
        _setting("S1", "llama-7b", 8),
        _setting("S2", "llama-7b", 64, 32, 16, 8),
        _setting("S3", "llama-13b", 16),
        _setting("S4", "llama-13b", 64, 32, 16),
        _setting("S5", "llama-30b", 32),
        _setting("S6", "llama-70b", 64),
        _setting("8B", "llama-3-8b", 16),
        _setting("8B mixed", "llama-3-8b", 8, 16, 32, 64),
    )
}


def find_setting(name: str) -> Setting:
    """Return a setting by name.

    Raises:
        SimulationError: there is none; the message lists those there are.
    """
    if name not in SETTINGS:
        raise SimulationError(f"no setting {name!r}; known are {', '.join(SETTINGS)}")
    return SETTINGS[name]
