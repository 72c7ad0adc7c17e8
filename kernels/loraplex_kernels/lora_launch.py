"""Launching the LoRA kernels: nothing here reads device memory, waits or allocates."""

from __future__ import annotations

import torch

from loraplex_kernels.lora_expand_triton import expand_kernel
from loraplex_kernels.lora_shape import LoRAShape
from loraplex_kernels.lora_shrink_triton import gather_kernel, shrink_kernel
from loraplex_kernels.lora_work import LoRATables


def shrink(
    x: torch.Tensor,
    pool_layer: torch.Tensor,
    tables: LoRATables,
    planes: torch.Tensor,
    *,
    layer: int,
    shape: LoRAShape,
    num_programs: int,
) -> None:
    """Fill the planes of one site of one layer.

    Args:
        x: `[T, in_features]` of the pool's dtype, rows contiguous; of an embedding, the token ids,
            integers `[T]`.
        pool_layer: `[P, page_elems]`, the pages that the page ids of `tables` mean.
        tables: the step's work on the device.
        planes: float32, written; which elements, the items of `tables` say.
        layer: index into the spans.
        shape: the site.
        num_programs: size of the grid: enough to fill the device, however long the list is.
    """
    arrays = (tables.rows, tables.pages, tables.items, tables.spans)
    span = layer * tables.spans.shape[1] + shape.index
    if shape.is_embedding:
        constants = shape.gather_constants(is_serial=tables.is_serial)
        gather_kernel[(num_programs,)](planes, x, pool_layer, *arrays, span, **constants)
        return
    assert x.stride(1) == 1, "rows of x are contiguous"
    shrink_kernel[(num_programs,)](
        planes,
        x,
        pool_layer,
        *arrays,
        x.stride(0),
        span,
        **shape.shrink_constants(is_serial=tables.is_serial),
        **shape.shrink_options,
    )


def expand(
    y: torch.Tensor,
    pool_layer: torch.Tensor,
    tables: LoRATables,
    planes: torch.Tensor,
    *,
    layer: int,
    shape: LoRAShape,
    num_programs: int,
) -> None:
    """Add the planes, times B, to `y` `[T, sum(out_features)]`; arguments as of `shrink`."""
    assert y.stride(1) == 1, "rows of y are contiguous"
    expand_kernel[(num_programs,)](
        y,
        planes,
        pool_layer,
        pool_layer,
        tables.rows,
        tables.pages,
        tables.items,
        tables.spans,
        y.stride(0),
        layer * tables.spans.shape[1] + shape.index,
        **shape.expand_constants(is_serial=tables.is_serial, is_weighted=tables.is_weighted),
        **(shape.weighted_options if tables.is_weighted else shape.expand_options),
    )


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool_layer: torch.Tensor,
    tables: LoRATables,
    *,
    layer: int,
    shape: LoRAShape,
    num_programs: int,
) -> None:
    """Do what `reference.add_lora` does, in two launches that read nothing on the host."""
    planes = tables.planes
    shrink(x, pool_layer, tables, planes, layer=layer, shape=shape, num_programs=num_programs)
    expand(y, pool_layer, tables, planes, layer=layer, shape=shape, num_programs=num_programs)
