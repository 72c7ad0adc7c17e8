"""Pages in host memory that hold one packed adapter, not necessarily side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from loraplex_memory.runs import runs


@dataclass(frozen=True)
class HostPages:
    """Page `i` of an adapter is `slab[pages[i]]`, all its layers in one piece.

    Attributes:
        slab: `[N, L, page_elems]` of the pool's dtype, contiguous.
        pages: indices into it.
    """

    slab: torch.Tensor
    pages: Sequence[int]

    def __len__(self) -> int:
        return len(self.pages)

    def part(self, first: int, stop: int) -> HostPages:
        """Return the pages `[first, stop)` of the adapter."""
        return HostPages(self.slab, self.pages[first:stop])

    def runs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the adapter in order, in pieces as long as pages lie side by side.

        Yields:
            Which page of the adapter is the first of the piece, and the piece `[n, L, page_elems]`.
        """
        for run in runs(self.pages):
            first = self.pages[run.start]
            yield run.start, self.slab[first : first + run.stop - run.start]

    def fill(self, packed: torch.Tensor) -> None:
        """Copy an adapter packed layer by layer, `[L, len(self), page_elems]`, into its pages."""
        assert packed.shape[1] == len(self.pages)
        for start, piece in self.runs():
            piece.copy_(packed[:, start : start + len(piece)].transpose(0, 1))
