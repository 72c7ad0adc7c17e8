"""What the LoRA kernels are compiled with when no GPU is there: see `aot`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from loraplex_kernels.aot import CUT_SHAPE, AotCase, ModelShape
from loraplex_kernels.elementwise_triton import aligned
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


def lora_case(
    name: str,
    fn: Any,
    constants: Mapping[str, int],
    options: Mapping[str, int] | None = None,
    *,
    reads_tiles: bool = True,
) -> AotCase:
    """Return one variant of one kernel.

    Args:
        options: of its launch.
        reads_tiles: whether it reads weights 16 bytes at a time.
    """
    options = options or {}
    signature = {arg: _TYPES.get(arg, "*i32") for arg in fn.arg_names if arg not in constants}
    own = ("num_warps", "num_stages")
    return AotCase(
        name,
        fn,
        signature,
        constants,
        attrs=aligned(fn, signature),
        must_vectorise=("pool_ptr",) if reads_tiles else (),
        options={key: value for key, value in options.items() if key not in own},
        **{key: value for key, value in options.items() if key in own},
    )
