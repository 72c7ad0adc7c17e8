"""An adapter from a staging buffer into its pages.

`pool[l, pages[i]] = staging[i, l]`: bytes are moved as they are, 16 at a time and thread, so the
launch is bound by memory: it reads and writes every byte of the adapter once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from loraplex_kernels.aot import AotCase, ModelShape

#: Elements that one program moves: four 16-byte vectors of bfloat16 per thread.
_BLOCK: Final = 4096

_NUM_WARPS: Final = 4


def scatter_pages(staging: torch.Tensor, pages: torch.Tensor, pool: torch.Tensor) -> None:
    """Copy staged pages of some layers to where they belong; launches one kernel.

    Args:
        staging: `[N, L, page_elems]`, contiguous: a page with all its layers is one piece of host
            memory, so that is how it crosses.
        pages: int64 `[N]`, distinct, on the same device.
        pool: `[L, P, page_elems]` of the same dtype, written; may be a slice of a pool's layers.
    """
    N, L, page_elems = staging.shape
    assert staging.is_contiguous()
    assert pages.shape == (N,)
    assert pool.dtype == staging.dtype
    assert pool.shape[::2] == (L, page_elems)
    assert pool.stride()[1:] == (page_elems, 1)
    if staging.numel() == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(page_elems))
    _scatter_kernel[(N * triton.cdiv(page_elems, block), L)](
        staging,
        pages,
        pool,
        L,
        pool.stride(0),
        PAGE_ELEMS=page_elems,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )


# No variant of its own for a number of layers that 16 divides: the page is what addresses rest on.
@triton.jit(do_not_specialize=["num_layers"])
def _scatter_kernel(
    staging_ptr,
    pages_ptr,
    pool_ptr,
    num_layers,
    pool_layer_stride,
    PAGE_ELEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`pool[l, pages[i], e] = staging[i, l, e]` for one block of `e`."""
    blocks_per_page: tl.constexpr = (PAGE_ELEMS + BLOCK - 1) // BLOCK
    i = (tl.program_id(0) // blocks_per_page).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    e = (tl.program_id(0) % blocks_per_page) * BLOCK + tl.arange(0, BLOCK)
    mask = e < PAGE_ELEMS
    page = tl.load(pages_ptr + i)
    values = tl.load(staging_ptr + (i * num_layers + layer) * PAGE_ELEMS + e, mask=mask)
    tl.store(pool_ptr + layer * pool_layer_stride + page * PAGE_ELEMS + e, values, mask=mask)


def aot_cases(shape: ModelShape) -> list[AotCase]:
    """Return the variants that serving `shape` launches; see `loraplex_kernels.aot`."""
    from loraplex_kernels.aot import AotCase

    names = _scatter_kernel.arg_names
    # A layer of the pool is whole pages, so its stride is divisible by 16 wherever a page is.
    aligned = [names.index(n) for n in ("staging_ptr", "pages_ptr", "pool_ptr")]
    if shape.page_elems % 16 == 0:
        aligned.append(names.index("pool_layer_stride"))
    return [
        AotCase(
            name=f"scatter page {shape.page_elems}",
            fn=_scatter_kernel,
            signature={
                "staging_ptr": "*bf16",
                "pages_ptr": "*i64",
                "pool_ptr": "*bf16",
                "num_layers": "i32",
                "pool_layer_stride": "i64",
            },
            constexprs={
                "PAGE_ELEMS": shape.page_elems,
                "BLOCK": min(_BLOCK, triton.next_power_of_2(shape.page_elems)),
            },
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
            num_warps=_NUM_WARPS,
            must_vectorise=("staging_ptr",),
        )
    ]
