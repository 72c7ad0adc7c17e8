"""The loader beside the step: fenced when submitted, finished when written, or failed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from loraplex_memory.adapter_file import read_adapter_file, write_adapter_file
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter
from loraplex_scheduler.plan import AdapterLoad
from loraplex_server.engine.loader import AdapterLoader
from tests.support.kernel_cases import make_weights

GEOMETRY = ModelGeometry(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
LAYOUT = PoolLayout(GEOMETRY, page_tokens=4)


class HeldWriter(DirectWriter):
    """Writes only once it is let go; notes what the loader asks of it, and in which thread."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool)
        self.gate = threading.Event()
        self.fence_threads: list[int] = []
        self.waited_for: list[object] = []

    def fence(self):
        self.fence_threads.append(threading.get_ident())
        return len(self.fence_threads)

    def buffer(self, num_pages):
        buffer = super().buffer(num_pages)
        buffer.slab.fill_(float("nan"))
        return buffer

    def write(self, pages, packed, *, after):
        self.waited_for.append(after)
        assert self.gate.wait(10)
        super().write(pages, packed, after=after)


@pytest.fixture
def pool():
    return PagePool(LAYOUT, 40, dtype=torch.float32)


@pytest.fixture
def start():
    """Make loaders and close them after the test."""
    loaders: list[AdapterLoader] = []

    def make(*args, **options):
        loaders.append(AdapterLoader(*args, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def save(path, rank: int = 2, seed: int = 0) -> AdapterManifest:
    """Write an adapter on every linear; it is called as its file is."""
    ranks = ((rank,) * 7,) * GEOMETRY.num_layers
    write_adapter_file(path, make_weights(GEOMETRY, ranks, torch.Generator().manual_seed(seed)))
    return AdapterManifest(path.name, str(path), ranks)


def make_load(tmp_path, name: str, first_page: int, rank: int = 2) -> AdapterLoad:
    manifest = save(tmp_path / name, rank=rank, seed=first_page)
    layout = AdapterLayout(LAYOUT, manifest.ranks)
    return AdapterLoad(manifest, layout, tuple(range(first_page, first_page + layout.num_pages)))


def packed_of(load: AdapterLoad) -> torch.Tensor:
    return pack_adapter(
        read_adapter_file(Path(load.adapter.path)), load.layout, dtype=torch.float32
    )


def test_a_load_is_in_its_pages_when_it_is_reported(pool, start, tmp_path):
    woken = threading.Event()
    loader = start(pool, woken.set)
    load = make_load(tmp_path, "a", 3)
    loader.submit(load)
    assert [(r.adapter_id, r.error) for r in loader.poll(10)] == [("a", None)]
    assert woken.wait(10)
    assert torch.equal(pool.data[:, list(load.pages)], packed_of(load))
    assert (loader.num_outstanding, loader.num_loads, loader.num_failures) == (0, 1, 0)


def test_a_fence_is_taken_by_who_submits_before_the_writing_starts(pool, start, tmp_path):
    writer = HeldWriter(pool)
    loader = start(pool, writer=writer)
    loads = [make_load(tmp_path, "a", 0), make_load(tmp_path, "b", 20)]
    for load in loads:
        loader.submit(load)
    assert writer.fence_threads == [threading.get_ident()] * 2
    assert loader.poll() == []
    assert loader.num_outstanding == 2
    writer.gate.set()
    done = loader.poll(10)
    while len(done) < 2:
        done += loader.poll(10)
    assert writer.waited_for == [1, 2]
    for load in loads:  # whatever the buffers held before
        assert torch.equal(pool.data[:, list(load.pages)], packed_of(load))


def test_a_file_that_is_not_there_is_a_failed_load_and_the_next_succeeds(pool, start, tmp_path):
    loader = start(pool)
    good = make_load(tmp_path, "a", 0)
    missing = AdapterManifest("gone", str(tmp_path / "gone"), good.adapter.ranks)
    loader.submit(AdapterLoad(missing, good.layout, good.pages))
    (result,) = loader.poll(10)
    assert result.adapter_id == "gone"
    assert "could not be loaded" in result.error
    loader.submit(good)
    assert loader.poll(10)[0].error is None
    assert (loader.num_loads, loader.num_failures) == (1, 1)


def test_a_write_that_fails_is_a_failed_load(pool, start, tmp_path):
    class BrokenWriter(DirectWriter):
        def write(self, pages, packed, *, after):
            raise RuntimeError("the device is gone")

    loader = start(pool, writer=BrokenWriter(pool))
    loader.submit(make_load(tmp_path, "a", 0))
    assert "the device is gone" in loader.poll(10)[0].error
