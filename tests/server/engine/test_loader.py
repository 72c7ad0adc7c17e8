"""The loader beside the step: fenced when submitted, finished when written, or failed."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex_memory.adapter_file import read_adapter_file, write_adapter_file
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.host_arena import HostArena
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter
from loraplex_scheduler.plan import AdapterLoad
from loraplex_server.engine.loader import AdapterLoader, LoadResult, _Job
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
    pairs = make_weights(GEOMETRY, ranks, torch.Generator().manual_seed(seed))
    write_adapter_file(path, AdapterWeights(pairs))
    return AdapterManifest(path.name, str(path), AdapterSpec(ranks))


def make_load(tmp_path, name: str, first_page: int, rank: int = 2) -> AdapterLoad:
    manifest = save(tmp_path / name, rank=rank, seed=first_page)
    layout = AdapterLayout(LAYOUT, manifest.spec)
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


def poll_all(loader: AdapterLoader, num_results: int) -> list[LoadResult]:
    results: list[LoadResult] = []
    for _ in range(100):
        results += loader.poll(10)
        if len(results) >= num_results and loader.num_outstanding == 0:
            break
    assert len(results) == num_results
    return results


def finish_prefetches(loader: AdapterLoader) -> None:
    assert poll_all(loader, 0) == []


# ---- failures, with real files ---------------------------------------------------------------


def vanish(path):
    path.unlink()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_within_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def lose_all_bytes(path):
    """What is left of a file that was written to a full disk."""
    path.write_bytes(b"")


def spoil_the_header(path):
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\x00{{"
    path.write_bytes(data)


def claim_a_huge_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def break_the_disk(path):
    """Address 0 of a process is what Linux answers with EIO, without a broken disk."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def change_ranks(path):
    save(path, rank=3)


FAULTS = {
    vanish: "No such file",
    cut_short: "truncated",
    cut_within_the_header: "truncated",
    lose_all_bytes: "truncated",
    spoil_the_header: "could not be loaded",
    claim_a_huge_header: "truncated",
    become_a_folder: "Is a directory",
    break_the_disk: "Input/output error",
    change_ranks: "modules and their ranks",
}


@pytest.mark.parametrize("has_arena", [False, True])
@pytest.mark.parametrize(
    ("spoil", "reason"), FAULTS.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_a_file_that_cannot_be_loaded_harms_nothing_else(
    pool, start, tmp_path, spoil, reason, has_arena
):
    arena = HostArena(LAYOUT, 40, dtype=torch.float32) if has_arena else None
    loader = start(pool, arena=arena)
    bad, good = make_load(tmp_path, "bad", 0), make_load(tmp_path, "good", 20)
    spoil(tmp_path / "bad")
    pool.data.fill_(-1.0)
    for load in (bad, good, bad):
        loader.submit(load)
    results = poll_all(loader, 3)
    assert [result.adapter_id for result in results] == ["bad", "good", "bad"]
    assert results[1].error is None
    for result in (results[0], results[2]):
        assert result.error.startswith("the adapter could not be loaded: ")
        assert reason in result.error
    assert (loader.num_loads, loader.num_failures) == (1, 2)
    assert torch.equal(pool.data[:, list(good.pages)], packed_of(good))
    others = [page for page in range(pool.num_pages) if page not in good.pages]
    assert (pool.data[:, others] == -1.0).all()
    if arena is not None:
        assert loader.host_adapters() == ("good",)
        assert loader.host_bytes == len(good.pages) * pool.page_bytes
        arena.check()


def test_a_fault_that_is_repaired_is_forgotten(pool, start, tmp_path):
    loader = start(pool, arena=HostArena(LAYOUT, 40, dtype=torch.float32))
    load = make_load(tmp_path, "a", 0)
    vanish(tmp_path / "a")
    loader.submit(load)
    assert poll_all(loader, 1)[0].error
    load = make_load(tmp_path, "a", 0)
    loader.submit(load)
    assert poll_all(loader, 1)[0].error is None
    assert torch.equal(pool.data[:, list(load.pages)], packed_of(load))


@pytest.mark.parametrize("num_host_pages", [0, 40])
def test_a_write_that_fails_is_a_failed_load(pool, start, tmp_path, num_host_pages):
    class BrokenWriter(DirectWriter):
        def write(self, pages, packed, *, after):
            raise RuntimeError("the device is gone")

    arena = HostArena(LAYOUT, num_host_pages, dtype=torch.float32)
    loader = start(pool, writer=BrokenWriter(pool), arena=arena)
    loader.submit(make_load(tmp_path, "a", 0))
    assert "the device is gone" in loader.poll(10)[0].error
    arena.check()


# ---- host memory -----------------------------------------------------------------------------


@pytest.fixture
def arena():
    """Room for two adapters of rank 2, eight pages each, and not for one of rank 5."""
    return HostArena(LAYOUT, 17, dtype=torch.float32)


def test_an_adapter_is_read_once_while_it_stays_in_host_memory(pool, start, arena, tmp_path):
    loader = start(pool, arena=arena)
    load = make_load(tmp_path, "a", 3)
    expected = packed_of(load)
    loader.submit(load)
    poll_all(loader, 1)
    vanish(tmp_path / "a")
    pool.data.zero_()
    elsewhere = replace(load, pages=tuple(reversed(range(20, 20 + len(load.pages)))))
    loader.submit(elsewhere)
    assert poll_all(loader, 1)[0].error is None
    assert torch.equal(pool.data[:, list(elsewhere.pages)], expected)
    assert (loader.num_loads, loader.num_host_hits) == (2, 1)
    assert loader.host_bytes == len(load.pages) * pool.page_bytes
    assert loader.host_capacity_bytes == 17 * pool.page_bytes


def test_the_least_used_makes_room_in_host_memory(pool, start, arena, tmp_path):
    loader = start(pool, arena=arena)
    loads = {name: make_load(tmp_path, name, at) for at, name in ((0, "a"), (10, "b"), (20, "c"))}
    for name in "abac":
        loader.submit(loads[name])
        assert poll_all(loader, 1)[0].error is None
    assert sorted(loader.host_adapters()) == ["a", "c"]
    for load in loads.values():
        assert torch.equal(pool.data[:, list(load.pages)], packed_of(load))
    arena.check()


@pytest.mark.parametrize("num_host_pages", [0, 17, None])
def test_an_adapter_without_a_place_in_host_memory_is_loaded_all_the_same(
    pool, start, tmp_path, num_host_pages
):
    arena = None
    if num_host_pages is not None:
        arena = HostArena(LAYOUT, num_host_pages, dtype=torch.float32)
    loader = start(pool, arena=arena)
    large = make_load(tmp_path, "large", 5, rank=5)
    assert len(large.pages) > 17
    loader.prefetch(large.adapter)
    loader.submit(large)
    assert poll_all(loader, 1)[0].error is None
    assert torch.equal(pool.data[:, list(large.pages)], packed_of(large))
    assert (loader.host_bytes, loader.host_adapters(), loader.num_prefetches) == (0, (), 0)


def test_a_load_tells_how_long_it_took_without_its_time_in_the_queue(pool, start, tmp_path):
    now_s = [100.0]

    class SlowWriter(DirectWriter):
        def write(self, pages, packed, *, after):
            now_s[0] += 2.0

    loader = start(pool, writer=SlowWriter(pool), clock=lambda: now_s[0])
    for at in (0, 10, 20):
        loader.submit(make_load(tmp_path, f"a{at}", at))
    assert [result.took_s for result in poll_all(loader, 3)] == [2.0] * 3
    assert loader.load_s == 6.0


# ---- prefetching -----------------------------------------------------------------------------


def test_a_prefetch_fills_host_memory_and_reports_nothing(pool, start, arena, tmp_path):
    woken = threading.Event()
    loader = start(pool, woken.set, arena=arena)
    load = make_load(tmp_path, "a", 0)
    pool.data.fill_(-1.0)
    loader.prefetch(load.adapter)
    finish_prefetches(loader)
    assert woken.wait(10)
    assert (loader.num_prefetches, loader.host_adapters()) == (1, ("a",))
    assert (pool.data == -1.0).all()
    vanish(tmp_path / "a")
    loader.prefetch(load.adapter)
    assert loader.num_outstanding == 0
    loader.submit(load)
    assert poll_all(loader, 1)[0].error is None
    assert (loader.num_prefetches, loader.num_host_hits, loader.num_loads) == (1, 1, 1)


def test_waiting_for_loads_ends_with_a_prefetch(pool, start, arena, tmp_path):
    loader = start(pool, arena=arena)
    loader.prefetch(make_load(tmp_path, "a", 0).adapter)
    started = time.monotonic()
    assert loader.poll(30) == []
    assert time.monotonic() - started < 20


def test_a_prefetch_that_fails_is_forgotten(pool, start, arena, tmp_path, caplog):
    loader = start(pool, arena=arena)
    load = make_load(tmp_path, "a", 0)
    vanish(tmp_path / "a")
    loader.prefetch(load.adapter)
    finish_prefetches(loader)
    assert "No such file" in caplog.text
    assert (loader.num_failures, loader.num_prefetches, loader.host_bytes) == (0, 0, 0)
    arena.check()


@pytest.fixture
def held(pool, start, tmp_path):
    """Return a loader with a large arena whose thread is at its first load, and the writer."""
    writer = HeldWriter(pool)
    loader = start(pool, writer=writer, arena=HostArena(LAYOUT, 200, dtype=torch.float32))
    loader.submit(make_load(tmp_path, "first", 0))
    return loader, writer


def test_loads_come_before_prefetches(pool, start, tmp_path):
    order = []

    class Noting(DirectWriter):
        def write(self, pages, packed, *, after):
            order.append(loader.num_prefetches)
            super().write(pages, packed, after=after)

    loader = start(pool, writer=Noting(pool), arena=HostArena(LAYOUT, 99, dtype=torch.float32))
    ahead = [make_load(tmp_path, f"ahead{i}", 0).adapter for i in range(3)]
    loads = [make_load(tmp_path, f"load{i}", 10 * i) for i in range(3)]
    with loader._lock:  # the thread begins when all are queued
        for adapter in ahead:
            loader._prefetches[adapter.adapter_id] = _Job(adapter)
        loader._lock.notify()
        for load in loads:
            loader._loads.append(_Job(load.adapter, load))
            loader._num_unreported += 1
    poll_all(loader, 3)
    assert order == [0, 0, 0]
    assert loader.num_prefetches == 3


def test_a_prefetch_of_what_is_on_its_way_does_nothing(held, tmp_path):
    loader, writer = held
    second = make_load(tmp_path, "second", 20)
    loader.submit(second)
    ahead = make_load(tmp_path, "ahead", 0)
    for adapter in (second.adapter, ahead.adapter, ahead.adapter):
        loader.prefetch(adapter)
    assert loader.num_outstanding == 3
    writer.gate.set()
    poll_all(loader, 2)
    assert loader.num_prefetches == 1


def test_only_a_few_prefetches_wait_those_asked_for_first(held, tmp_path):
    loader, writer = held
    for i in range(20):
        is_wanted = loader.prefetch(make_load(tmp_path, f"p{i:02}", 0, rank=1).adapter)
        assert is_wanted == (i < 8)
    assert loader.num_outstanding == 1 + 8
    writer.gate.set()
    poll_all(loader, 1)
    assert loader.num_prefetches == 8
    assert loader.host_adapters() == ("first", *(f"p{i:02}" for i in range(8)))


def test_what_is_discarded_does_not_stay_in_host_memory(held, tmp_path):
    """Whether it is being copied, waits for a load or a prefetch, or is there and idle."""
    loader, writer = held
    queued, ahead = make_load(tmp_path, "queued", 10), make_load(tmp_path, "ahead", 0)
    loader.submit(queued)
    loader.prefetch(ahead.adapter)
    for name in ("first", "queued", "ahead"):
        loader.discard(name)
    writer.gate.set()
    assert [(r.adapter_id, r.error) for r in poll_all(loader, 2)] == [
        ("first", None),
        ("queued", None),
    ]
    assert (loader.host_adapters(), loader.host_bytes, loader.num_prefetches) == ((), 0, 0)
    loader.submit(queued)
    poll_all(loader, 1)
    assert loader.host_adapters() == ("queued",), "it may come back"
    loader.discard("queued")
    assert loader.host_bytes == 0


def test_closing_drops_what_is_queued(pool, tmp_path):
    writer = HeldWriter(pool)
    loader = AdapterLoader(pool, writer=writer, arena=HostArena(LAYOUT, 99, dtype=torch.float32))
    for at in (0, 10):
        loader.submit(make_load(tmp_path, f"a{at}", at))
    loader.prefetch(make_load(tmp_path, "ahead", 0).adapter)
    closing = threading.Thread(target=loader.close)
    closing.start()
    deadline = time.monotonic() + 10
    while not loader._is_closing:  # what is queued would still be done before that
        assert time.monotonic() < deadline
        time.sleep(0.001)
    writer.gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert loader.num_prefetches == 0
