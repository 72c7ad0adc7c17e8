"""What the LoRA kernels are compiled with when no GPU is there: see `aot`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

from loraplex_kernels.aot import CUT_SHAPE, AotCase, ModelShape
from loraplex_kernels.lora_shape import LoRAShape

#: Types of the run-time arguments that are not int32 tables.
_TYPES: Final = {
    "x_ptr": "*bf16",
    "y_ptr": "*bf16",
    "pool_ptr": "*bf16",
    "vectors_ptr": "*bf16",
    "planes_ptr": "*fp32",
    "token_ids_ptr": "*i64",
    "x_stride": "i32",
    "y_stride": "i32",
    "span": "i32",
}


#: Returns the case of a launch that reads weights in tiles, unless told otherwise.
lora_case: Final = functools.partial(AotCase.of_launch, types=_TYPES, weights="pool_ptr")


def site_variants(model: ModelShape) -> Iterator[tuple[str, LoRAShape, bool]]:
    """Yield name, shape and `is_serial` of what serving a model launches for linears.

    Sites have their K split or, for large steps, serial. The output head computes a row per
    sequence, and so is never serial; one of several devices always is.
    """
    head = (model.hidden_size, (model.vocab_size,))
    for name, (in_features, widths) in {**model.sites, "lm_head": head}.items():
        shape = _shape(model, in_features, widths)
        yield f"{name}, split", shape, False
        if name != "lm_head":
            yield f"{name}, serial", shape, True
    if CUT_SHAPE.name.startswith(model.name):
        for name, (in_features, widths) in CUT_SHAPE.sites.items():
            yield f"{name}, 1 of 4", _shape(CUT_SHAPE, in_features, widths), True


def _shape(model: ModelShape, in_features: int, widths: tuple[int, ...]) -> LoRAShape:
    modules = tuple(range(len(widths)))
    return LoRAShape(0, modules, in_features, widths, model.chunk_elems, model.page_elems)
