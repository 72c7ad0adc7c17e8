"""Page geometry: the only place that computes how large a page is and what fits into it.

The pool is one tensor `[L, P, page_elems]`. A page id means the same slice in every layer, so one
block table serves the whole model, for sequences and for adapters alike. `page_elems` is what
`page_tokens` tokens of one layer need for K and V.

Adapter weights fill pages as a run of *chunks*: `chunk_elems` divides every row length of every
LoRA matrix of the model and the page itself, so a chunk never crosses a page border and no row is
ever padded (DESIGN.md, "Page geometry").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from loraplex_memory.partition import Partition

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
Site = Literal["qkv", "o", "gate_up", "down"]

#: The linears of one layer that can carry LoRA, in the order every table indexes them.
PROJECTIONS: Final[tuple[Projection, ...]] = ("q", "k", "v", "o", "gate", "up", "down")

#: Projections that share an input and are computed by one pair of launches.
SITES: Final[dict[Site, tuple[Projection, ...]]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes of a decoder that memory and kernels need; counts of elements, not bytes."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def in_features(self, projection: Projection) -> int:
        """Return the length of one row of the projection's A matrix `[R, in]`."""
        if projection == "o":
            return self.num_heads * self.head_dim
        if projection == "down":
            return self.intermediate_size
        return self.hidden_size

    def out_features(self, projection: Projection) -> int:
        """Return the length of one row of the projection's B matrix, stored as `[R, out]`."""
        if projection == "q":
            return self.num_heads * self.head_dim
        if projection in ("k", "v"):
            return self.num_kv_heads * self.head_dim
        if projection in ("gate", "up"):
            return self.intermediate_size
        return self.hidden_size

    @property
    def kv_elems_per_token(self) -> int:
        """Elements of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class PoolLayout:
    """How one model's KV cache and adapters share equal pages.

    Attributes:
        geometry: of the whole model.
        num_ranks: devices that the model is cut over. Each has a pool of its own of such pages:
            a page id means the same on all of them, and on each its own part of the bytes.
    """

    geometry: ModelGeometry
    page_tokens: int = 16
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens must be at least 1, not {self.page_tokens}")

    @cached_property
    def partition(self) -> Partition:
        return Partition(self.geometry, self.num_ranks)

    @property
    def shard(self) -> ModelGeometry:
        """The part of the model that one rank computes and whose KV it has: all, if it is alone."""
        return self.partition.shard

    def a_width(self, projection: Projection) -> int:
        """Return the length of a row of A in the pages, `[a_ranks, in]`."""
        return self.partition.inputs(projection, 0).width

    def b_width(self, projection: Projection) -> int:
        """Return the length of a row of B in the pages, `[R, out]`."""
        return self.partition.outputs(projection, 0).width

    def a_ranks(self, projection: Projection, rank: int) -> int:
        """Return the rows of A that pages hold of an adapter of this rank."""
        return self.partition.a_ranks(projection, rank, 0).width

    @cached_property
    def page_elems(self) -> int:
        """Elements of one page in one layer."""
        return self.page_tokens * self.shard.kv_elems_per_token

    @cached_property
    def chunk_elems(self) -> int:
        """The longest run that divides every LoRA row in the pages, and the page."""
        rows = [width(p) for p in PROJECTIONS for width in (self.a_width, self.b_width)]
        return math.gcd(self.page_elems, *rows)

    @property
    def chunks_per_page(self) -> int:
        return self.page_elems // self.chunk_elems

    def pages_for_tokens(self, num_tokens: int) -> int:
        """Pages that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def page_bytes(self, elem_bytes: int) -> int:
        """Bytes of one page over all layers."""
        return self.geometry.num_layers * self.page_elems * elem_bytes
