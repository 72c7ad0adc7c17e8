"""The pages of one sequence, in token order."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.prefix_cache import PrefixCache
from loraplex_memory.prefix_node import PrefixNode


class PrefixMatch(NamedTuple):
    """What the prefix cache has of a prompt.

    Attributes:
        num_tokens: tokens whose keys and values are there.
        num_idle_pages: pages among them that nobody uses, which adopting takes from the evictable.
    """

    num_tokens: int
    num_idle_pages: int


class PageTable:
    """Owned by one sequence: page `i` holds tokens `[i * page_tokens, (i + 1) * page_tokens)`.

        [0, num_shared)             nodes of the prefix cache, which the table holds references on
        [num_shared, len(pages))    private

    Only pages of tokens below `max_shared` are ever shared, and only with tables of one `salt`:
    what the others hold does not follow from the adapter and the tokens alone. Grows by whole pages
    through the allocator and gives everything back at once.

    Attributes:
        pages: never changed, but replaced: plans keep the array that they found, and most steps of
            a sequence find the same one. An array of C integers: numpy takes thousands of them at
            once where it would convert one by one.
    """

    __slots__ = (
        "_adapter_id",
        "_allocator",
        "_max_shared",
        "_page_tokens",
        "_path",
        "_prefixes",
        "_salt",
        "pages",
    )

    def __init__(
        self,
        allocator: PageAllocator,
        page_tokens: int,
        prefixes: PrefixCache,
        adapter_id: str | None,
        max_shared: int = sys.maxsize,
        salt: str = "",
    ) -> None:
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._prefixes = prefixes
        self._adapter_id = adapter_id
        self._max_shared = max_shared
        self._salt = salt
        self._path: list[PrefixNode] = []
        self.pages = array("i")

    @property
    def capacity(self) -> int:
        """Tokens that fit into the pages held now."""
        return len(self.pages) * self._page_tokens

    @property
    def num_shared(self) -> int:
        """Leading pages that belong to the prefix cache."""
        return len(self._path)

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
            self.pages = self.pages + array("i", self._allocator.alloc(missing, PageUse.KV))

    def match(self, token_ids: Sequence[int], max_tokens: int) -> PrefixMatch:
        """Look up the longest cached run of whole pages of at most `max_tokens` tokens."""
        path = self._find(token_ids, max_tokens)
        num_used = 0  # users of a node use all before it
        while num_used < len(path) and path[num_used].num_refs:
            num_used += 1
        return PrefixMatch(len(path) * self._page_tokens, len(path) - num_used)

    def adopt(self, token_ids: Sequence[int], max_tokens: int) -> int:
        """Use the run that `match` would find from now on, and return its tokens.

        The table must be empty.
        """
        assert not self.pages, "only an empty table can start with cached pages"
        self._path = self._find(token_ids, max_tokens)
        self._prefixes.take(self._path)
        self.pages = array("i", [node.page for node in self._path])
        return len(self._path) * self._page_tokens

    def publish(self, token_ids: Sequence[int], num_tokens: int, *, may_replace: bool) -> None:
        """Offer the whole pages among the first `num_tokens` tokens to the prefix cache.

        May be called while the step that computes them is only drafted: whoever adopts them reads
        them in that step or later, and in each layer a step writes the keys and values of all its
        rows before attention reads any. The drafted step must then be launched with these spans.

        Args:
            token_ids: the sequence's tokens, all of those at least.
            may_replace: where the cache has the same page already, use that and free the own one.
                Not for a drafted step, which names the own page: there, publishing ends before it.
        """
        assert num_tokens <= self.capacity, "tokens without a page"
        num_tokens = min(num_tokens, self._max_shared)
        if num_tokens >= (len(self._path) + 1) * self._page_tokens and self._prefixes.is_enabled:
            if may_replace:
                self.pages = self.pages[:]
            self._prefixes.publish(
                self._adapter_id,
                self._path,
                self.pages,
                token_ids,
                num_tokens,
                may_replace=may_replace,
                salt=self._salt,
            )

    def _find(self, token_ids: Sequence[int], max_tokens: int) -> list[PrefixNode]:
        max_tokens = min(max_tokens, self._max_shared)
        return self._prefixes.find(self._adapter_id, token_ids, max_tokens, salt=self._salt)

    def release(self) -> None:
        """Give every page back; published ones stay in the cache until the space is needed."""
        self._allocator.free(self.pages[len(self._path) :])
        self._prefixes.release(self._path)
        self._path = []
        self.pages = array("i")
