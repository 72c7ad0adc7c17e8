"""A few tokens through the packed adapter, as the pool would hold it, against dense arithmetic.

What is compared is our own work: packing, page tables, the paged kernels. So a failure is never
the adapter's fault. Kernels run in float32, the reference in float64 from the unpacked tensors:

    y' = out_scale * (y + scale * B (A x)) + bias

The error of a site is the largest difference, relative to the largest sum of absolute terms: what
rounding is relative to, also where terms cancel. Parts that no LoRA kernel reads are compared as
they lie in their pages, and must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from loraplex_kernels.batch import LoRABatch, PagedAdapter, build_lora_batch
from loraplex_kernels.cpu import add_lora
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import Part, bias, out_scale
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS, SITES, Projection, Site
from loraplex_memory.packing import pack_adapter
from loraplex_server.adapters.errors import SelfTestFailed

#: Some hundred times what float32 rounds away over the longest sums of any model.
MAX_ERROR: Final = 1e-4
_NUM_TOKENS: Final = 3
_NUM_OTHER_PAGES: Final = 2


def self_test(weights: AdapterWeights, layout: AdapterLayout) -> float:
    """Return the largest relative error over all sites of all layers; 0.0 if it has none.

    Of the whole adapter, also where devices have a part of it each.

    Raises:
        SelfTestFailed: it is above `MAX_ERROR`, or not a number.
    """
    layout = AdapterLayout(replace(layout.pool, num_ranks=1), layout.spec)
    packed = pack_adapter(weights, layout, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    # Not in order and not from 0: a kernel that ignores the page table must fail.
    pages = torch.randperm(layout.num_pages + _NUM_OTHER_PAGES, generator=generator)
    pages = pages[: layout.num_pages]
    batch = _batch(layout, pages)
    worst = _part_error(packed, weights, layout)
    pool_layer = torch.full((layout.num_pages + _NUM_OTHER_PAGES, packed.shape[2]), torch.nan)
    for layer in range(packed.shape[0]):
        pool_layer[pages] = packed[layer]
        for site in SITES:
            if _is_changed(weights, layer, site):
                error = _site_error(weights, layout, batch, pool_layer, layer, site, generator)
                worst = max(worst, error) if error == error else float("inf")
    if not worst <= MAX_ERROR:
        raise SelfTestFailed(worst, MAX_ERROR)
    return worst


def _batch(layout: AdapterLayout, pages: torch.Tensor) -> LoRABatch:
    adapter = PagedAdapter(
        pages.numpy()[: layout.num_layer_pages].astype(np.int32),
        np.array(layout.ranks, dtype=np.int32),
        np.array(layout.a_chunks, dtype=np.int32),
        np.array(layout.b_chunks, dtype=np.int32),
        np.array([layout.layer_part(out_scale(p)) or _nowhere(layout) for p in PROJECTIONS]).T,
        np.array([layout.layer_part(bias(p)) or _nowhere(layout) for p in PROJECTIONS]).T,
    )
    # The first token has no adapter: its row may not change.
    batch = build_lora_batch([adapter], [range(1, _NUM_TOKENS)], layout.pool.chunk_elems)
    assert batch is not None, "one adapter makes a batch"
    return batch


def _nowhere(layout: AdapterLayout) -> tuple[int, ...]:
    return (-1,) * layout.pool.geometry.num_layers


def _is_changed(weights: AdapterWeights, layer: int, site: Site) -> bool:
    return any(
        (layer, p) in weights.lora
        or (out_scale(p), layer) in weights.parts
        or (bias(p), layer) in weights.parts
        for p in SITES[site]
    )


def _site_error(
    weights: AdapterWeights,
    layout: AdapterLayout,
    batch: LoRABatch,
    pool_layer: torch.Tensor,
    layer: int,
    site: Site,
    generator: torch.Generator,
) -> float:
    projections, geometry = SITES[site], layout.pool.geometry
    widths = tuple(geometry.out_features(p) for p in projections)
    x = torch.randn(_NUM_TOKENS, geometry.in_features(projections[0]), generator=generator)
    y = torch.randn(_NUM_TOKENS, sum(widths), generator=generator)
    before = y.double()
    add_lora(
        y,
        x,
        pool_layer,
        batch,
        layer=layer,
        projections=tuple(map(PROJECTIONS.index, projections)),
        out_features=widths,
    )
    errors = [(y[:1].double() - before[:1]).abs().max().item()]
    pieces = zip(
        projections, torch.split(y, [*widths], 1), torch.split(before, [*widths], 1), strict=True
    )
    for projection, found, base in pieces:
        expected, terms = _dense(weights, layer, projection, x[1:].double(), base[1:])
        errors.append(((found[1:].double() - expected).abs().max() / terms.max()).item())
    return max(errors) if all(error == error for error in errors) else float("nan")


def _dense(
    weights: AdapterWeights, layer: int, projection: Projection, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `y'` of one projection, and the sums of the absolute values of its terms."""
    terms = y.abs()
    if (pair := weights.lora.get((layer, projection))) is not None:
        a, b = pair.a.double().T, pair.b.double().T * pair.scale
        y, terms = y + (x @ a) @ b, terms + (x.abs() @ a.abs()) @ b.abs()
    if (factor := weights.parts.get((out_scale(projection), layer))) is not None:
        y, terms = y * factor.double(), terms * factor.double().abs()
    if (shift := weights.parts.get((bias(projection), layer))) is not None:
        y, terms = y + shift.double(), terms + shift.double().abs()
    return y, terms.clamp_min(torch.finfo(torch.float32).tiny)


def _part_error(packed: torch.Tensor, weights: AdapterWeights, layout: AdapterLayout) -> float:
    """Return 0.0 if every part lies where the layout says, as it came; else infinity."""
    slices = packed[:, layout.num_layer_pages :].transpose(0, 1).flatten()
    chunk = layout.pool.chunk_elems
    for part in layout.spec.parts:
        for layer, flat, start in _places(part, layout, packed, slices):
            pitch = layout.row_pitch(part)
            found = flat[start * chunk : start * chunk + part.num_rows * pitch]
            found = found.view(part.num_rows, pitch)[:, : part.row_elems]
            if not torch.equal(found, weights.parts[part.name, layer].float()):
                return float("inf")
    return 0.0


def _places(
    part: Part, layout: AdapterLayout, packed: torch.Tensor, slices: torch.Tensor
) -> Iterator[tuple[int | None, torch.Tensor, int]]:
    """Yield (layer, the elements it lies in, its first chunk there)."""
    if (start := layout.model_part(part.name)) is not None:
        yield None, slices, start
    starts = layout.layer_part(part.name)
    for layer in part.layers:
        assert starts is not None, "a part of layers has a place in each"
        yield layer, packed[layer].flatten(), starts[layer]
