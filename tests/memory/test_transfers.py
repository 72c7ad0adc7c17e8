"""Writers put an adapter into its pages; the streamed one in pieces, behind a fence."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from loraplex_kernels.scatter_triton import scatter_pages
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter, StreamWriter

GEOMETRY = ModelGeometry(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
LAYOUT = PoolLayout(GEOMETRY, page_tokens=4)
PAGE_BYTES = LAYOUT.page_elems * 4


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


def assert_holds(pool: PagePool, pages: list[int], packed: torch.Tensor) -> None:
    """The adapter is in its pages, and every other page is as it was."""
    assert torch.equal(pool.data[:, pages], packed)
    others = [page for page in range(pool.num_pages) if page not in pages]
    assert (pool.data[:, others] == -1.0).all()


def test_the_direct_writer_copies_at_once():
    pool, packed = make_pool(), make_packed(4)
    writer = DirectWriter(pool)
    buffer = writer.buffer(4)
    assert (buffer.shape, buffer.dtype) == (packed.shape, pool.dtype)
    writer.write([9, 2, 3, 0], buffer.copy_(packed), after=writer.fence())
    assert_holds(pool, [9, 2, 3, 0], packed)


@pytest.mark.parametrize(
    ("staged_pages", "pieces"),
    [
        (15, [(3, 5)]),
        (14, [(2, 5), (1, 5)]),
        (9, [(1, 5)] * 3),
        (4, [(1, 4), (1, 1)] * 3),
        (1, [(1, 1)] * 15),
        (0, [(1, 1)] * 15),
    ],
)
def test_an_adapter_of_any_size_crosses_behind_the_fence(staged_pages, pieces):
    pool, packed, streams = make_pool(), make_packed(5), RecordedStreams()
    writer = StreamWriter(
        pool, streams.scatter, staging_bytes=staged_pages * PAGE_BYTES, streams=streams
    )
    pages = [7, 11, 0, 4, 5]
    writer.write(pages, writer.buffer(5).copy_(packed), after=writer.fence())
    assert_holds(pool, pages, packed)
    scatters = [("scatter", shape) for shape in pieces]
    assert streams.notes == [("wait for fence", 1), *scatters, "done"]


def test_buffers_are_used_again_by_the_next_adapter():
    pool, streams = make_pool(), RecordedStreams()
    writer = StreamWriter(pool, streams.scatter, staging_bytes=15 * PAGE_BYTES, streams=streams)
    for seed, pages in enumerate(([1, 2, 3], [8, 4], [5, 6, 7, 9, 10])):
        pool.data.fill_(-1.0)
        packed = make_packed(len(pages), seed)
        buffer = writer.buffer(len(pages))
        assert buffer.data_ptr() == writer.buffer(1).data_ptr()
        writer.write(pages, buffer.copy_(packed), after=writer.fence())
        assert_holds(pool, pages, packed)


def test_a_write_that_fails_still_waits_for_what_it_enqueued():
    streams = RecordedStreams()

    def scatter(staging, pages, pool):
        raise RuntimeError("out of order")

    writer = StreamWriter(make_pool(), scatter, streams=streams, staging_bytes=PAGE_BYTES)
    with pytest.raises(RuntimeError, match="out of order"):
        writer.write([1], make_packed(1), after=writer.fence())
    assert streams.notes == [("wait for fence", 1), "done"]


def test_no_pages_are_no_copies():
    streams = RecordedStreams()
    writer = StreamWriter(make_pool(), streams.scatter, streams=streams)
    writer.write([], writer.buffer(0), after=writer.fence())
    assert streams.notes == [("wait for fence", 1), "done"]
