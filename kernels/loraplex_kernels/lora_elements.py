"""How the LoRA kernels read an adapter's slice of a layer, and the work list that drives them.

Element `e` of the slice lies in page `pages[e // PAGE_ELEMS]` at offset `e % PAGE_ELEMS`. A tile
takes power-of-two runs, aligned to their own length, of whole rows: none crosses a page border, so
a row of a tile needs one page id and loads 16 bytes at a time. Where that power of two is below 16,
which only tests have, and for what is no tile, the page of each element is looked up: here.
"""

# Triton reads the annotations of a kernel as types of its own: only constexprs have one.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from loraplex_kernels.lora_shape import ROW_TILE
from loraplex_kernels.lora_work import ITEM_FIELDS, NUM_LAUNCHES

#: Token rows of a tile; elements of an item of the work list, and of a launch's spans.
ROWS = tl.constexpr(ROW_TILE)
ITEM = tl.constexpr(ITEM_FIELDS)
SPAN = tl.constexpr(2 * NUM_LAUNCHES)


@triton.jit
def load_elements(pool_ptr, pages, e, mask, PAGE_ELEMS: tl.constexpr):
    """Elements `e` of a slice, each through its own page id; 0 where `mask` is false."""
    page = tl.load(pages + e // PAGE_ELEMS, mask=mask, other=0).to(tl.int64)
    return tl.load(pool_ptr + page * PAGE_ELEMS + e % PAGE_ELEMS, mask=mask, other=0.0)


@triton.jit
def load_item(items_ptr, index):
    """The fields of an item of the work list, in their order: see `lora_work.LoRAWork`."""
    item = items_ptr + index * ITEM
    return (
        tl.load(item),
        tl.load(item + 1),
        tl.load(item + 2),
        tl.load(item + 3),
        tl.load(item + 4),
        tl.load(item + 5),
        tl.load(item + 6),
        tl.load(item + 7),
    )
