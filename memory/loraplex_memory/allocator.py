"""The free list of the page pool: ids only, O(1) per page, no tensors.

Invariant: every page is either on the free stack or held for exactly one use; the two always add
up to `num_pages` (`check`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum

from loraplex_memory.errors import OutOfPages


class PageUse(StrEnum):
    """What a held page is for; any freed page serves any use."""

    KV = "kv"  # private to one sequence
    PREFIX = "prefix"  # owned by the prefix cache, whether sequences use it or not
    ADAPTER = "adapters"


class PageAllocator:
    """Owned by the engine step (one thread); hands out page ids and takes them back."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._use: list[PageUse | None] = [None] * num_pages
        self._held = dict.fromkeys(PageUse, 0)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_held(self, use: PageUse) -> int:
        """Pages held for `use` now."""
        return self._held[use]

    def alloc(self, num_pages: int, use: PageUse) -> list[int]:
        """Take `num_pages` pages.

        Raises:
            OutOfPages: fewer are free; nothing was taken.
        """
        if num_pages > len(self._free):
            raise OutOfPages(requested=num_pages, available=len(self._free))
        pages = [self._free.pop() for _ in range(num_pages)]
        uses = self._use
        for page in pages:
            uses[page] = use
        self._held[use] += num_pages
        return pages

    def reassign(self, pages: Collection[int], former: PageUse, use: PageUse) -> None:
        """Let pages held for one use serve another; ValueError when one is not held for it."""
        uses = self._use
        for page in pages:
            if uses[page] is not former:
                raise ValueError(f"page {page} serves no {former} use")
            uses[page] = use
        self._held[former] -= len(pages)
        self._held[use] += len(pages)

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back; freeing a page that is not held is a bug and raises ValueError."""
        for page in pages:
            use = self._use[page]
            if use is None:
                raise ValueError(f"page {page} freed twice")
            self._use[page] = None
            self._held[use] -= 1
            self._free.append(page)

    def check(self) -> None:
        """Raise AssertionError if a page is lost, doubled or misfiled."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        held = {page for page, use in enumerate(self._use) if use is not None}
        assert not free & held, f"pages both free and held: {sorted(free & held)}"
        assert len(free) + len(held) == self.num_pages, "a page is neither free nor held"
        for use in PageUse:
            assert self._held[use] == sum(u == use for u in self._use), f"count of {use} is off"
