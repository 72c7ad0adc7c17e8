"""Laying what an adapter has beside its LoRA pairs out in its pages, in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import Part, is_out_scale
from loraplex_memory.adapter_weights import PartKey


def pack_parts(
    packed: torch.Tensor, parts: Mapping[PartKey, torch.Tensor], layout: AdapterLayout
) -> None:
    """Put every part where `layout` says; parts of the model follow the layers' pages.

    Args:
        packed: `[L, layout.num_pages, page_elems]`, contiguous; what lies behind the LoRA pairs is
            written, gaps between rows too.
        parts: those of `layout.parts`; each is rounded once, to the dtype of `packed`. What that
            takes from an output scale is its second row: a whole output is multiplied by it, and
            a bfloat16 is off by up to 0.4 %.
    """
    if not layout.parts:
        return
    chunk = layout.pool.chunk_elems
    rows = packed.flatten(1)
    model_pages = packed[:, layout.num_layer_pages :]
    slices = torch.zeros(model_pages.transpose(0, 1).shape, dtype=packed.dtype)
    flat = slices.view(-1)
    for part in layout.parts:
        starts = layout.layer_part(part.name)
        for layer in part.layers:
            assert starts is not None, "a part of layers has a place in each"
            _put(rows[layer], starts[layer] * chunk, parts[part.name, layer], part, layout)
        start = layout.model_part(part.name)
        if start is not None:
            _put(flat, start * chunk, parts[part.name, None], part, layout)
    model_pages.copy_(slices.transpose(0, 1))


def _put(
    flat: torch.Tensor, start: int, matrix: torch.Tensor, part: Part, layout: AdapterLayout
) -> None:
    """Copy `[num_rows, row_elems]` to rows at the part's pitch, from element `start` on."""
    if is_out_scale(part.name):
        exact = matrix.float()
        matrix = torch.cat((exact, exact - exact.to(flat.dtype).float()))
    pitch, num_rows = layout.row_pitch(part), layout.paged_rows(part)
    place = flat[start : start + num_rows * pitch].view(num_rows, pitch)
    place[:, : part.row_elems].copy_(matrix)
    place[:, part.row_elems :].zero_()
