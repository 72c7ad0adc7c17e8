"""Writers put an adapter into its pages; the streamed one in pieces, behind a fence."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from loraplex_kernels.scatter_triton import scatter_pages
from loraplex_memory.host_pages import HostPages
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter, StreamWriter

GEOMETRY = ModelGeometry(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
LAYOUT = PoolLayout(GEOMETRY, page_tokens=4)


class RecordedStreams:
    """Streams on a CPU: runs everything at once and notes the order."""

    def __init__(self) -> None:
        self.notes: list[object] = []
        self.num_fences = 0

    def fence(self):
        self.num_fences += 1
        return self.num_fences

    @contextmanager
    def copying(self, after):
        self.notes.append(("wait for fence", after))
        try:
            yield
        finally:
            self.notes.append("done")

    def scatter(self, staging, pages, pool):
        self.notes.append(("scatter", tuple(staging.shape[:2])))
        scatter_pages(staging, pages, pool)


def make_pool(num_pages: int = 12) -> PagePool:
    pool = PagePool(LAYOUT, num_pages, dtype=torch.float32)
    pool.data.fill_(-1.0)
    return pool


def make_packed(num_pages: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, num_pages, LAYOUT.page_elems, generator=generator)


def in_arena(packed: torch.Tensor, pages: list[int]) -> HostPages:
    """Put a packed adapter into these pages of host memory; NaN is all around it."""
    slab = torch.full((max(pages) + 2, 3, LAYOUT.page_elems), float("nan"))
    held = HostPages(slab, pages)
    held.fill(packed)
    return held


def assert_holds(pool: PagePool, pages: list[int], packed: torch.Tensor) -> None:
    """The adapter is in its pages, and every other page is as it was."""
    assert torch.equal(pool.data[:, pages], packed)
    others = [page for page in range(pool.num_pages) if page not in pages]
    assert (pool.data[:, others] == -1.0).all()


@pytest.mark.parametrize("host_pages", [[0, 1, 2, 3], [5, 6, 2, 3], [9, 0, 4, 2]], ids=str)
def test_the_direct_writer_copies_at_once(host_pages):
    pool, packed = make_pool(), make_packed(4)
    writer = DirectWriter(pool)
    writer.write([9, 2, 3, 0], in_arena(packed, host_pages), after=writer.fence())
    assert_holds(pool, [9, 2, 3, 0], packed)


@pytest.mark.parametrize("host_pages", [[0, 1, 2, 3, 4], [5, 6, 7, 2, 3], [9, 0, 4, 2, 7]], ids=str)
@pytest.mark.parametrize(
    ("staged_pages", "rounds"), [(5, [5]), (4, [4, 1]), (2, [2, 2, 1]), (1, [1] * 5), (0, [1] * 5)]
)
def test_an_adapter_of_any_size_crosses_behind_the_fence(staged_pages, rounds, host_pages):
    pool, packed, streams = make_pool(), make_packed(5), RecordedStreams()
    writer = StreamWriter(
        pool, streams.scatter, staging_bytes=staged_pages * pool.page_bytes, streams=streams
    )
    pages = [7, 11, 0, 4, 5]
    writer.write(pages, in_arena(packed, host_pages), after=writer.fence())
    assert_holds(pool, pages, packed)
    scatters = [("scatter", (num_pages, 3)) for num_pages in rounds]
    assert streams.notes == [("wait for fence", 1), *scatters, "done"]


@pytest.mark.parametrize("num_pages", [1, 3, 5])
def test_an_adapter_without_a_place_in_the_arena_is_packed_in_a_buffer(num_pages):
    """Of five pages, it is larger than the streamed writer's, too."""
    streams = RecordedStreams()
    for make_writer in (
        DirectWriter,
        lambda pool: StreamWriter(
            pool, streams.scatter, staging_bytes=3 * pool.page_bytes, streams=streams
        ),
    ):
        pool = make_pool()
        writer = make_writer(pool)
        for seed, pages in enumerate(([1, 2, 3, 7, 0], [8, 4, 5, 11, 2])):
            pool.data.fill_(-1.0)
            packed = make_packed(num_pages, seed)
            buffer = writer.buffer(num_pages)
            buffer.fill(packed)
            writer.write(pages[:num_pages], buffer, after=writer.fence())
            assert_holds(pool, pages[:num_pages], packed)
        assert writer.buffer(1).slab.data_ptr() == writer.buffer(1).slab.data_ptr()


def test_a_write_that_fails_still_waits_for_what_it_enqueued():
    streams = RecordedStreams()

    def scatter(staging, pages, pool):
        raise RuntimeError("out of order")

    writer = StreamWriter(make_pool(), scatter, streams=streams, staging_bytes=0)
    with pytest.raises(RuntimeError, match="out of order"):
        writer.write([1], in_arena(make_packed(1), [0]), after=writer.fence())
    assert streams.notes == [("wait for fence", 1), "done"]


def test_no_pages_are_no_copies():
    streams = RecordedStreams()
    writer = StreamWriter(make_pool(), streams.scatter, streams=streams)
    writer.write([], writer.buffer(0), after=writer.fence())
    assert streams.notes == [("wait for fence", 1), "done"]
