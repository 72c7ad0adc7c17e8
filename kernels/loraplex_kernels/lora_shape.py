"""Block sizes of the LoRA launches: decided by the shape of a site alone, never by the batch.

That is what keeps a row's delta the same bits in any company: its sums are cut at the same places
whoever else is in the step (DESIGN.md, invariant 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # it imports torch, which shapes do without
    from loraplex_kernels.model_tables import LoRASite

#: Token rows of every tensor-core tile. One shape for all segments; a decode row rides with 15
#: masked ones, which cost no bytes.
ROW_TILE: Final = 16


@dataclass(frozen=True)
class LoRATuning:
    """What may be tuned without changing a bit of the results, except `part_elems`.

    Attributes:
        segment_rows: rows of an item; its slice of the weights is read once for all of them.
        serial_rows: from this many LoRA rows in a step on, a program adds the K parts itself: there
            are items enough without the split, and the planes would outgrow the activations.
        rank_tile: rank rows of a shrink item while K is split.
        serial_rank_tile: the same from `serial_rows` on, where reading `x` again costs more than
            masked rank rows.
        part_elems: length of a K part, up to eight parts; twice that for longer rows.
        block_k_cap, block_n_cap: most elements of a weight row in one tile.
        shrink_warps, shrink_stages, expand_warps, expand_stages: of the compiled kernels. The
            shrink streams long rows through a pipeline; the expand has many small units instead,
            and registers to spare for more programs on a multiprocessor.
        narrow_registers: registers that a thread may use where tiles are narrower than the caps but
            feed all warps. Left to itself, ptxas there spills two or four for one more program.
    """

    segment_rows: int = 64
    serial_rows: int = 1024
    rank_tile: int = 16
    serial_rank_tile: int = 32
    part_elems: int = 512
    block_k_cap: int = 128
    block_n_cap: int = 128
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    expand_stages: int = 1
    narrow_registers: int = 80


@dataclass(frozen=True)
class LoRAShape:
    """Modules that share an input: one shrink and one expand launch.

    Attributes:
        index: position of the site among those of one work list.
        modules: columns of the LoRA batch's tables (`ranks[:, :, module]`), one to three.
        in_features: length of an A row; of an embedding, nothing (its A is gathered by token).
        out_features: output width of each module; their sum is the width of `y`.
        chunk_elems, page_elems: of the pool.
        is_embedding: A is stored `[V, R]` and looked up by token id instead of multiplied.
    """

    index: int
    modules: tuple[int, ...]
    in_features: int
    out_features: tuple[int, ...]
    chunk_elems: int
    page_elems: int
    is_embedding: bool = False
    tuning: LoRATuning = field(default_factory=LoRATuning)

    @classmethod
    def of(
        cls, site: LoRASite, *, chunk_elems: int, page_elems: int, tuning: LoRATuning | None = None
    ) -> LoRAShape:
        """Return the shape of a layer's site in a pool."""
        return cls(
            index=site.index,
            modules=site.projections,
            in_features=site.in_features,
            out_features=site.out_features,
            chunk_elems=chunk_elems,
            page_elems=page_elems,
            tuning=tuning or LoRATuning(),
        )

    def __post_init__(self) -> None:
        if not 1 <= len(self.modules) == len(self.out_features) <= 3:
            raise ValueError("a site has one to three modules and a width for each")
        if self.page_elems % self.chunk_elems:
            raise ValueError("a chunk must not cross a page border")

    def row_pitch(self, width: int) -> int:
        """Return the elements between rows of `width`: whole chunks."""
        return -(-width // self.chunk_elems) * self.chunk_elems

    @cached_property
    def run_elems(self) -> int:
        """Largest power of two that divides a chunk: no aligned run of it crosses a page."""
        return self.chunk_elems & -self.chunk_elems

    @property
    def is_tiled(self) -> bool:
        """Whether tiles are whole runs; if not, kernels look the page of each element up."""
        return self.run_elems >= 16

    @cached_property
    def block_k(self) -> int:
        """Elements of an A row in one tile."""
        return min(self.run_elems, self.tuning.block_k_cap) if self.is_tiled else 32

    @cached_property
    def block_n(self) -> int:
        """Elements of a B row in one tile."""
        return min(self.run_elems, self.tuning.block_n_cap) if self.is_tiled else 32

    @cached_property
    def part_elems(self) -> int:
        """Length of a K part: whole blocks, evenly cut, no longer than a page."""
        longest = self.tuning.part_elems * (1 if self.in_features <= 8192 else 2)
        longest = max(self.block_k, min(longest, self.page_elems))
        num_parts = -(-self.in_features // longest)
        even = -(-self.in_features // num_parts)
        return -(-even // self.block_k) * self.block_k

    @cached_property
    def num_parts(self) -> int:
        """K parts, added in order of their position; an embedding has none to add."""
        return 1 if self.is_embedding else -(-self.in_features // self.part_elems)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Column blocks of each module."""
        return tuple(-(-width // self.block_n) for width in self.out_features)

    def rank_tile(self, *, is_serial: bool) -> int:
        """Return the rank rows of a shrink item."""
        return self.tuning.serial_rank_tile if is_serial else self.tuning.rank_tile

    def gather_constants(self, *, is_serial: bool) -> dict[str, int]:
        """Return the compile-time arguments of the gather kernel."""
        return {"PAGE_ELEMS": self.page_elems, "RANK_TILE": self.rank_tile(is_serial=is_serial)}

    def shrink_constants(self, *, is_serial: bool) -> dict[str, int]:
        """Return the compile-time arguments of the shrink kernel."""
        return {
            "K": self.in_features,
            "PITCH": self.row_pitch(self.in_features),
            "PART": self.part_elems,
            "NUM_PARTS": self.num_parts,
            "PAGE_ELEMS": self.page_elems,
            "BLOCK_K": self.block_k,
            "RANK_TILE": self.rank_tile(is_serial=is_serial),
            "IS_SERIAL": is_serial,
            "IS_TILED": self.is_tiled,
        }

    def expand_constants(self, *, is_serial: bool, is_weighted: bool = False) -> dict[str, int]:
        """Return the compile-time arguments of the expand kernel."""
        widths = (*self.out_features, 0, 0)
        return {
            "WIDTH_0": widths[0],
            "WIDTH_1": widths[1],
            "WIDTH_2": widths[2],
            "CHUNK": self.chunk_elems,
            "NUM_PLANES": 1 if is_serial else self.num_parts,
            "PAGE_ELEMS": self.page_elems,
            "BLOCK_N": self.block_n,
            "IS_TILED": self.is_tiled,
            "IS_WEIGHTED": is_weighted,
        }

    @cached_property
    def shrink_options(self) -> dict[str, int]:
        """Compile options of the shrink kernel."""
        tuning = self.tuning
        num_warps = min(tuning.shrink_warps, _wide_warps(self.block_k))
        options = {"num_warps": num_warps, "num_stages": tuning.shrink_stages}
        return options | self._register_limit(self.block_k < tuning.block_k_cap, num_warps)

    @cached_property
    def expand_options(self) -> dict[str, int]:
        """Compile options of the expand kernel."""
        tuning = self.tuning
        num_warps = min(tuning.expand_warps, _wide_warps(self.block_n))
        options = {"num_warps": num_warps, "num_stages": tuning.expand_stages}
        return options | self._register_limit(self.block_n < tuning.block_n_cap, num_warps)

    @cached_property
    def weighted_options(self) -> dict[str, int]:
        """Compile options of the expand kernel with weights.

        Left alone, the compiler spills a few registers to fit more programs.
        """
        return {"maxnreg": 160} | self.expand_options

    def _register_limit(self, is_narrow: bool, num_warps: int) -> dict[str, int]:
        if not is_narrow:
            return {}
        limit = self.tuning.narrow_registers
        return {"maxnreg": limit if num_warps > 2 else 128}  # fewer threads leave more to each


def _wide_warps(block: int) -> int:
    """Return how many warps a tile feeds whose threads each load 16 bytes of a row.

    Parts of small models that are cut over many devices have tiles as narrow as 16 elements.
    """
    return max(1, ROW_TILE * block * 2 // (32 * 16))
