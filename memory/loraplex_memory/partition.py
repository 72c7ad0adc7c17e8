"""How one model is cut for several devices: Megatron's cut of the base, S-LoRA's of the adapters.

Attention is cut by KV heads, with the query heads that read them; a KV head that several ranks need
is on each of them. Everything else is cut into equal runs. What does not divide is padded with
zeros, so that all ranks are alike and one set of page ids serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # a pool's layout is made of a partition
    from loraplex_memory.layout import ModelGeometry, Projection

#: Linears whose input is cut over the ranks, and whose outputs therefore add up over them. All
#: others read the whole input and have their outputs cut.
ROW_PARALLEL: Final[frozenset[Projection]] = frozenset({"o", "down"})

#: Padded columns come in as many: a LoRA row is read in chunks that divide every row's length, and
#: an odd width would leave chunks of an element.
_UNIT: Final = 32


@dataclass(frozen=True)
class Cut:
    """One rank's part of a dimension: `[start, stop)` of the whole, then zeros up to `width`."""

    start: int
    stop: int
    width: int

    def scaled(self, factor: int) -> Cut:
        """Return the cut of a dimension that has `factor` elements for each of this one's."""
        return Cut(self.start * factor, self.stop * factor, self.width * factor)

    @property
    def padding(self) -> int:
        """Zeros behind the rank's own elements."""
        return self.width - (self.stop - self.start)


def even_cut(total: int, num_ranks: int, rank: int, unit: int = 1) -> Cut:
    """Return the part of `rank`: parts of equal width, of which the last ones may hold less.

    Args:
        unit: what the width is a multiple of, unless the parts hold all of it without padding.
    """
    width = -(-total // num_ranks)
    if width * num_ranks != total:
        width = -(-width // unit) * unit
    start = min(rank * width, total)
    return Cut(start, min(start + width, total), width)


@dataclass(frozen=True)
class Partition:
    """The cuts of one model for `num_ranks` ranks; the same object on all of them."""

    geometry: ModelGeometry
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"a model is cut for at least 1 rank, not {self.num_ranks}")

    @cached_property
    def shard(self) -> ModelGeometry:
        """The sizes of one rank's part, padding included."""
        return replace(
            self.geometry,
            num_heads=self.heads(0).width,
            num_kv_heads=self.kv_heads(0).width,
            intermediate_size=self.intermediate(0).width,
        )

    @property
    def _group_size(self) -> int:
        """Query heads that read one KV head."""
        return self.geometry.num_heads // self.geometry.num_kv_heads

    @cached_property
    def _copies(self) -> int:
        """Ranks that share a KV head; 1 where there is at least one for each rank."""
        kv_heads = self.geometry.num_kv_heads
        if kv_heads >= self.num_ranks:
            return 1
        owners = next(n for n in range(kv_heads, self.num_ranks + 1) if self.num_ranks % n == 0)
        return self.num_ranks // owners

    def kv_heads(self, rank: int) -> Cut:
        """Return which KV heads a rank has."""
        owners = self.num_ranks // self._copies
        return even_cut(self.geometry.num_kv_heads, owners, rank // self._copies)

    def heads(self, rank: int) -> Cut:
        """Return which query heads a rank has: those of its KV heads, or its share of them."""
        kv_heads = self.kv_heads(rank)
        if self._copies == 1:
            return kv_heads.scaled(self._group_size)
        share = even_cut(self._group_size, self._copies, rank % self._copies)
        if kv_heads.start == kv_heads.stop:
            end = self.geometry.num_heads
            return Cut(end, end, share.width)
        first = kv_heads.start * self._group_size
        return Cut(first + share.start, first + share.stop, share.width)

    def intermediate(self, rank: int) -> Cut:
        """Return which columns of the MLP a rank has."""
        return even_cut(self.geometry.intermediate_size, self.num_ranks, rank, _UNIT)

    def outputs(self, projection: Projection, rank: int) -> Cut:
        """Return which outputs of a linear's update a rank computes: its rows of B `[out, R]`.

        For row-parallel linears these are columns of the hidden state, of whose base outputs every
        rank has a summand.
        """
        if projection in ROW_PARALLEL:
            return even_cut(self.geometry.hidden_size, self.num_ranks, rank, _UNIT)
        if projection == "q":
            return self.heads(rank).scaled(self.geometry.head_dim)
        if projection in ("k", "v"):
            return self.kv_heads(rank).scaled(self.geometry.head_dim)
        return self.intermediate(rank)

    def inputs(self, projection: Projection, rank: int) -> Cut:
        """Return which inputs of a linear a rank has: its columns of A `[R, in]`."""
        if projection == "o":
            return self.heads(rank).scaled(self.geometry.head_dim)
        if projection == "down":
            return self.intermediate(rank)
        return Cut(0, self.geometry.hidden_size, self.geometry.hidden_size)

    def a_ranks(self, projection: Projection, lora_rank: int, rank: int) -> Cut:
        """Return which rank rows of A `[R, in]` a rank multiplies by its inputs."""
        if projection in ROW_PARALLEL:
            return Cut(0, lora_rank, lora_rank)
        return even_cut(lora_rank, self.num_ranks, rank)

    @property
    def padded_share(self) -> float:
        """The share of the heads' and the MLP's computing that is done on padding."""
        useful, done = (
            g.num_heads * g.head_dim + g.intermediate_size for g in (self.geometry, self.shard)
        )
        return 1.0 - useful / (self.num_ranks * done)
