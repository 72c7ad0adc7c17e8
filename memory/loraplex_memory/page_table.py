"""The pages of one sequence, in token order."""

from __future__ import annotations

from array import array

from loraplex_memory.allocator import PageAllocator, PageUse


class PageTable:
    """Owned by one sequence: page `i` holds tokens `[i * page_tokens, (i + 1) * page_tokens)`.

    Grows by whole pages through the allocator and gives everything back at once. Page ids are an
    array of C integers: numpy takes thousands of them at once where it would convert one by one.
    """

    def __init__(self, allocator: PageAllocator, page_tokens: int) -> None:
        self._allocator = allocator
        self._page_tokens = page_tokens
        self.pages = array("i")

    @property
    def capacity(self) -> int:
        """Tokens that fit into the pages held now."""
        return len(self.pages) * self._page_tokens

    def pages_missing(self, num_tokens: int) -> int:
        """Pages to allocate before `num_tokens` tokens fit."""
        return max(0, -(-num_tokens // self._page_tokens) - len(self.pages))

    def grow(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in all.

        Raises:
            OutOfPages: the table is left as it was.
        """
        missing = self.pages_missing(num_tokens)
        if missing:
            self.pages.extend(self._allocator.alloc(missing, PageUse.KV))

    def release(self) -> None:
        """Give every page back."""
        self._allocator.free(self.pages)
        self.pages = array("i")
