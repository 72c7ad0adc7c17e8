"""Reading what an adapter has beside its LoRA pairs out of the pool, on the pool's device.

Nothing here waits for a device: where a part lies is known on the host, page ids are uploaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from loraplex_kernels.reference import read_rows
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import EMBEDDING_A, Part
from loraplex_memory.pool import PagePool

#: Elements of a whole embedding or head gathered at a time: bounds the memory of a step.
_BLOCK_ELEMS: Final = 1 << 24


class PagedParts:
    """The parts of one adapter; lives for one step, as its pages may be another's afterwards."""

    def __init__(self, pool: PagePool, layout: AdapterLayout, pages: torch.Tensor) -> None:
        """Read from `pages`, int64 `[layout.num_pages]` on the pool's device."""
        self._pool = pool
        self._layout = layout
        num_layers, num_pages = pool.data.shape[:2]
        self._layer_pages = pages[: layout.num_layer_pages]
        # Slice s of the other pages is layer s % L of page s // L (see `adapter_layout`).
        layers = torch.arange(num_layers, device=pages.device)
        self._slices = (pages[layout.num_layer_pages :, None] + layers * num_pages).flatten()

    def part(self, name: str) -> Part | None:
        """Return the part of this name, if the adapter has it."""
        return self._layout.part(name)

    def of_layer(self, name: str, layer: int) -> torch.Tensor | None:
        """Return a part of one layer, `[num_rows, row_elems]`; None where there is none.

        Of an output scale it is two rows, to be added.
        """
        part, starts = self.part(name), self._layout.layer_part(name)
        if part is None or starts is None or starts[layer] < 0:
            return None
        shape = self._layout.paged_rows(part), part.row_elems
        chunk_elems = self._layout.pool.chunk_elems
        pages = self._layer_pages
        return read_rows(self._pool.layer(layer), pages, starts[layer], shape, chunk_elems)

    def of_model(self, name: str) -> torch.Tensor | None:
        """Return a part of the whole model, `[num_rows, row_elems]`; None where there is none."""
        part = self.part(name)
        return None if part is None else self._rows_of(part, 0, part.num_rows)

    def blocks(self, part: Part) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield all rows of a large part of the model in turn, behind the first one's index."""
        num_rows = max(1, _BLOCK_ELEMS // part.row_elems)
        for first in range(0, part.num_rows, num_rows):
            yield first, self._rows_of(part, first, min(num_rows, part.num_rows - first))

    def lookup(self, part: Part, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of a part of the model that only the device knows.

        Args:
            part: of the model.
            rows: int64 `[n]`, below its `num_rows`.

        Returns:
            `[n, row_elems]` of the pool's dtype.
        """
        layout = self._layout
        chunk_elems = layout.pool.chunk_elems
        unit = 1 if part.name == EMBEDDING_A else chunk_elems  # its rows are not whole chunks
        units_per_page = layout.pool.page_elems // unit
        pitch = layout.row_pitch(part) // unit
        first = self._start(part) * (chunk_elems // unit)
        at = first + rows[:, None] * pitch + torch.arange(pitch, device=rows.device)
        where = self._slices[at // units_per_page] * units_per_page + at % units_per_page
        return self._pool.data.view(-1, unit)[where].flatten(1)[:, : part.row_elems]

    def _rows_of(self, part: Part, first: int, num_rows: int) -> torch.Tensor:
        assert part.name != EMBEDDING_A, "its rows are not whole chunks"
        chunk_elems = self._layout.pool.chunk_elems
        row_chunks = self._layout.row_pitch(part) // chunk_elems
        return read_rows(
            self._pool.data.flatten(0, 1),
            self._slices,
            self._start(part) + first * row_chunks,
            (num_rows, part.row_elems),
            chunk_elems,
        )

    def _start(self, part: Part) -> int:
        start = self._layout.model_part(part.name)
        assert start is not None, "a part of the whole model"
        return start
