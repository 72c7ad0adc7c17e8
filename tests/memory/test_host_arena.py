"""Packed adapters in host memory: filled once, held while they are copied, given back."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from loraplex_memory.host_arena import HostArena
from loraplex_memory.host_pages import HostPages
from loraplex_memory.layout import ModelGeometry, PoolLayout

LAYOUT = PoolLayout(ModelGeometry(3, 32, 4, 2, 8, 48), page_tokens=4)
PAGE_BYTES = LAYOUT.page_bytes(4)


def make_arena(num_pages: int = 8) -> HostArena:
    return HostArena(LAYOUT, num_pages, dtype=torch.float32)


def make_packed(num_pages: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, num_pages, LAYOUT.page_elems, generator=generator)


def content(pages: HostPages) -> torch.Tensor:
    return pages.slab[list(pages.pages)].transpose(0, 1)


def never(pages: HostPages) -> None:
    raise AssertionError("it was here already")


def test_an_adapter_is_filled_once_and_stays():
    arena, packed = make_arena(), make_packed(3)
    with arena.hold("a", 3, 0.0, lambda pages: pages.fill(packed)) as held:
        assert torch.equal(content(held), packed)
    with arena.hold("a", 3, 1.0, never) as held:
        assert torch.equal(content(held), packed)
    assert ("a" in arena, arena.adapter_ids(), arena.num_hits) == (True, ("a",), 1)
    assert (arena.used_bytes, arena.capacity_bytes) == (3 * PAGE_BYTES, 8 * PAGE_BYTES)
    arena.check()


def test_pages_that_are_apart_are_filled_and_read_in_runs():
    arena, packed = make_arena(), make_packed(5)
    for name, num_pages in (("a", 2), ("b", 1), ("c", 2), ("d", 3)):
        with arena.hold(name, num_pages, 0.0, lambda pages: None):
            pass
    arena.discard("a")
    arena.discard("c")
    arena.discard("d")
    with arena.hold("e", 5, 1.0, lambda pages: pages.fill(packed)) as held:
        assert list(held.pages) == [0, 1, 3, 4, 5]
        runs = list(held.runs())
        assert [(first, len(piece)) for first, piece in runs] == [(0, 2), (2, 3)]
        assert all(piece.is_contiguous() for _, piece in runs)
        assert torch.equal(torch.cat([piece for _, piece in runs]).transpose(0, 1), packed)
        part = held.part(1, 4)
        assert [(first, len(piece)) for first, piece in part.runs()] == [(0, 1), (1, 2)]
        assert torch.equal(content(part), packed[:, 1:4])


def test_a_fill_that_fails_gives_the_pages_back():
    arena = make_arena()

    def fail(pages):
        raise OSError("no")

    with pytest.raises(OSError, match="no"), arena.hold("a", 3, 0.0, fail):
        raise AssertionError("nobody may copy what is not there")
    assert (arena.used_bytes, "a" in arena) == (0, False)
    arena.check()


def test_a_copy_that_fails_leaves_the_adapter_here():
    arena = make_arena()
    with pytest.raises(OSError, match="no"), arena.hold("a", 3, 0.0, lambda pages: None):
        raise OSError("no")
    assert "a" in arena
    arena.check()


def test_what_does_not_fit_is_not_filled():
    arena = make_arena()
    with arena.hold("a", 9, 0.0, never) as held:
        assert held is None
    with arena.hold("b", 5, 0.0, lambda pages: None), arena.hold("c", 4, 1.0, never) as held:
        assert held is None, "the other one is being copied"
    with arena.hold("c", 4, 1.0, lambda pages: None) as held:
        assert held is not None
    assert arena.adapter_ids() == ("c",)
    with make_arena(0).hold("a", 1, 0.0, never) as held:
        assert held is None


def test_what_is_discarded_while_it_is_copied_keeps_its_pages_until_then():
    arena = make_arena()
    with arena.hold("a", 8, 0.0, lambda pages: None):
        discarding = threading.Thread(target=arena.discard, args=("a",))
        discarding.start()
        discarding.join(10)
        assert not discarding.is_alive(), "discarding waits for nobody"
        assert arena.used_bytes == 8 * PAGE_BYTES
        with arena.hold("b", 1, 1.0, never) as other:
            assert other is None
    assert (arena.used_bytes, arena.adapter_ids()) == (0, ())
    arena.check()


def test_memory_that_is_never_written_is_not_committed():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    arena = HostArena(LAYOUT, (256 << 20) // PAGE_BYTES, dtype=torch.float32)
    assert resident_bytes() - before < 16 << 20
    assert arena.capacity_bytes > 255 << 20


class Driver:
    """Answers as the GPU's driver does, which a machine without one cannot."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802  (CUDA's name)
        if self.status == 0:
            self.pinned[address] = num_bytes
        return self.status

    def cudaHostUnregister(self, address):  # noqa: N802  (CUDA's name)
        del self.pinned[address]
        return 0


def test_all_of_the_memory_is_pinned_until_it_is_given_up(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    arena = HostArena(LAYOUT, 8, dtype=torch.float32, is_pinned=True)
    empty = HostArena(LAYOUT, 0, dtype=torch.float32, is_pinned=True)
    assert list(driver.pinned.values()) == [8 * PAGE_BYTES]
    for each in (arena, arena, empty):
        each.close()
    assert not driver.pinned


def test_memory_that_cannot_be_pinned_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(status=2))
    with pytest.raises(MemoryError, match=r"CUDA error 2.*lower host_bytes"):
        HostArena(LAYOUT, 8, dtype=torch.float32, is_pinned=True)
