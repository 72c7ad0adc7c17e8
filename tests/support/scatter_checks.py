"""Checks of the scatter kernel against plain indexing, on any device; and of transfers on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from loraplex_kernels.scatter_triton import scatter_pages
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import StreamWriter


def check_scatter(
    device: torch.device,
    *,
    page_elems: int,
    pages: list[int],
    num_layers: int = 2,
    num_pages: int = 9,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    generator = torch.Generator().manual_seed(page_elems)
    staging = torch.randn(len(pages), num_layers, page_elems, generator=generator).to(dtype)
    pool = torch.full((num_layers, num_pages, page_elems), float("nan"), dtype=dtype)
    expected = pool.clone()
    expected[:, pages] = staging.transpose(0, 1)
    pool = pool.to(device)
    scatter_pages(staging.to(device), torch.tensor(pages, device=device), pool)
    assert torch.equal(pool.cpu().nan_to_num(-77), expected.nan_to_num(-77))


def pages_land_where_the_table_says_and_nowhere_else(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_scatter(device, page_elems=256, pages=[7, 0, 3, 8, 1], dtype=dtype)
    check_scatter(device, page_elems=256, pages=[4, 5, 6])
    check_scatter(device, page_elems=256, pages=list(range(9)), num_layers=3)


def any_length_of_page_works(device: torch.device) -> None:
    for page_elems in (1, 7, 24, 6144, 5000):
        check_scatter(device, page_elems=page_elems, pages=[5, 2], num_pages=6)


def one_page_and_none_work(device: torch.device) -> None:
    check_scatter(device, page_elems=64, pages=[3])
    check_scatter(device, page_elems=64, pages=[])


def some_layers_of_a_pool_are_written_alone(device: torch.device) -> None:
    staging = torch.arange(3 * 2 * 32, dtype=torch.float32).view(3, 2, 32)
    pool = torch.zeros(5, 8, 32, device=device)
    scatter_pages(staging.to(device), torch.tensor([6, 1, 2], device=device), pool[2:4])
    assert torch.equal(pool[2:4, [6, 1, 2]].cpu(), staging.transpose(0, 1))
    assert int(pool.count_nonzero()) == int(staging.count_nonzero())


def every_bit_pattern_survives(device: torch.device) -> None:
    """Infinities, NaN payloads and denormals: a copy, not arithmetic."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    pool = torch.zeros(1, 4, 2**15, dtype=torch.bfloat16, device=device)
    staging = bits.view(torch.bfloat16).view(2, 1, 2**15).to(device)
    scatter_pages(staging, torch.tensor([3, 1], device=device), pool)
    assert torch.equal(pool[:, [3, 1]].cpu().view(torch.int16), bits.view(1, 2, 2**15))


def pools_beyond_2_to_the_31_elements_are_addressed(device: torch.device) -> None:
    """5 GiB, so on a device only; layers and pages of a layer both end beyond 32 bits."""
    if device.type == "cpu":
        return
    page_elems, num_pages = 32768, 66_000
    pool = torch.zeros(2, num_pages, page_elems, dtype=torch.int8, device=device)
    staging = torch.randint(1, 100, (3, 2, page_elems), dtype=torch.int8, device=device)
    pages = [num_pages - 1, 0, 65_537]
    scatter_pages(staging, torch.tensor(pages, device=device), pool)
    assert torch.equal(pool[:, pages], staging.transpose(0, 1))
    assert int(pool.count_nonzero()) == staging.numel()


def a_load_waits_for_what_was_launched_before_it(device: torch.device) -> None:
    """A launched step may still write pages that a load was given since: the load comes last."""
    if device.type == "cpu":
        return
    layout = PoolLayout(ModelGeometry(3, 512, 4, 2, 128, 1024))
    pool = PagePool(layout, 40, dtype=torch.bfloat16, device=device)
    pages, others = [7, 30, 0, 39, 5], [1, 6, 8, 38]
    for staged_pages in (33, 5, 2, 0):
        staging_bytes = staged_pages * pool.page_bytes
        writer = StreamWriter(pool, scatter_pages, staging_bytes=staging_bytes)
        expected = torch.randn(3, len(pages), layout.page_elems).to(torch.bfloat16)
        packed = writer.buffer(len(pages))
        packed.fill(expected)
        torch.cuda._sleep(200_000_000)
        pool.data.fill_(-1.0)
        fence = writer.fence()
        with ThreadPoolExecutor(1) as loader:
            loader.submit(writer.write, pages, packed, after=fence).result()
        assert torch.equal(pool.data[:, pages].cpu(), expected)
        assert bool((pool.data[:, others] == -1.0).all())


SCATTER_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    (check.__name__, check)
    for check in (
        pages_land_where_the_table_says_and_nowhere_else,
        any_length_of_page_works,
        one_page_and_none_work,
        some_layers_of_a_pool_are_written_alone,
        every_bit_pattern_survives,
        pools_beyond_2_to_the_31_elements_are_addressed,
        a_load_waits_for_what_was_launched_before_it,
    )
]

#: Checks that have nothing to check on a CPU.
GPU_ONLY = {
    "pools_beyond_2_to_the_31_elements_are_addressed",
    "a_load_waits_for_what_was_launched_before_it",
}
