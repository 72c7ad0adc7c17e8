"""Keys and values of prompts that were computed before, for whoever starts with the same tokens.

A radix tree over whole pages, one per adapter (None: the base model) and salt: a node is one page,
and its parent finds it by the page's token ids. What a page holds follows from adapter and tokens
alone, so who finds a path finds the right bytes, and nothing is ever found across adapters. Salts
keep those apart who shall not notice what the others ask.

Invariants: a sequence holds a reference on every node of its path, so a node has at least as many
as its children together. A node without references is *idle*, and so is all below it. Only idle
leaves leave.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from math import log2
from types import MappingProxyType
from typing import Final

from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.clock import GivenClock
from loraplex_memory.eviction import RestoreCosts, page_cost
from loraplex_memory.evictor import Evictor
from loraplex_memory.prefix_node import PrefixNode, PrefixRoot
from loraplex_memory.usage import ReturnOdds

_NO_ROOTS: Final[Mapping[str, PrefixRoot]] = MappingProxyType({})


class PrefixCache:
    """Owned by the engine step (one thread). Owns the pages of its nodes, in use or idle.

    A page that was found by somebody counts one use as of then, however many came before: what
    conversations need next is what was used last, and counting favours those that are over. A page
    that was never found counts the odds that it will be (`ReturnOdds`).
    """

    def __init__(
        self,
        allocator: PageAllocator,
        evictor: Evictor,
        costs: RestoreCosts,
        clock: GivenClock,
        page_tokens: int,
        *,
        is_enabled: bool = True,
    ) -> None:
        self._allocator = allocator
        self._evictor = evictor
        self._costs = costs
        self._clock = clock
        self._half_life_s = evictor.policy.prefix_half_life_s
        self._odds = ReturnOdds()
        # By adapter, then by salt; none of the inner ones is empty.
        self._roots: dict[str | None, dict[str, PrefixRoot]] = {}
        self._dropped: dict[PrefixRoot, None] = {}
        self._resident: set[str] = set()
        self.page_tokens = page_tokens
        self.is_enabled = is_enabled
        self.num_nodes = 0
        self.num_idle = 0

    def pages_by_adapter(self) -> dict[str | None, int]:
        """Return how many pages hold prefixes under each adapter; None is the base model."""
        pages = {
            adapter_id: sum(root.num_nodes for root in roots.values())
            for adapter_id, roots in self._roots.items()
        }
        for root in self._dropped:
            pages[root.adapter_id] = pages.get(root.adapter_id, 0) + root.num_nodes
        return pages

    def find(
        self, adapter_id: str | None, token_ids: Sequence[int], max_tokens: int, *, salt: str = ""
    ) -> list[PrefixNode]:
        """Return the longest path of whole pages among the first `max_tokens` tokens."""
        root = self._roots.get(adapter_id, _NO_ROOTS).get(salt)
        if root is None:
            return []
        path: list[PrefixNode] = []
        children = root.children
        size = self.page_tokens
        for end in range(size, min(max_tokens, len(token_ids)) + 1, size):
            node = children.get(_content(token_ids[end - size : end]))
            if node is None:
                break
            path.append(node)
            children = node.children
        return path

    def take(self, path: Sequence[PrefixNode]) -> None:
        """A sequence found these nodes and holds a reference on each from now on."""
        now = self._clock.now_s / self._half_life_s
        for node in path:
            if not node.num_refs:
                self.num_idle -= 1
                if not node.children:
                    node.root.idle_leaves.pop(node, None)
            node.num_refs += 1
            node.use_score = now
            if not node.was_hit:
                node.was_hit = True
                self._odds.returned()

    def publish(
        self,
        adapter_id: str | None,
        path: list[PrefixNode],
        pages: MutableSequence[int],
        token_ids: Sequence[int],
        num_tokens: int,
        *,
        may_replace: bool,
        salt: str = "",
    ) -> None:
        """Make nodes of a sequence's whole pages among its first `num_tokens` tokens.

        Args:
            path: the nodes that it holds; grows by those of the pages published.
            pages: its pages in token order, those of `path` first. Where somebody else made the
                same node meanwhile, the node's page takes the place of the sequence's own, which is
                freed; without `may_replace`, publishing ends there.
        """
        root = path[0].root if path else self._root(adapter_id, salt)
        if root.is_dropped:
            return
        size = self.page_tokens
        made: list[int] = []
        used_now = self._clock.now_s / self._half_life_s
        maybe_used = used_now + log2(self._odds.odds)
        parent: PrefixNode | PrefixRoot = path[-1] if path else root
        for end in range((len(path) + 1) * size, num_tokens + 1, size):
            content = _content(token_ids[end - size : end])
            node = parent.children.get(content)
            if node is None:
                chain, page = hash((parent.chain, content)), pages[len(path)]
                was_hit = self._odds.made(chain)
                score = used_now if was_hit else maybe_used
                node = PrefixNode(root, parent, content, page, chain, score, was_hit=was_hit)
                parent.children[content] = node
                made.append(page)
            elif may_replace:
                self._allocator.free((pages[len(path)],))
                pages[len(path)] = node.page
                self.take((node,))
            else:
                break
            path.append(node)
            parent = node
        if made:
            self._allocator.reassign(made, PageUse.KV, PageUse.PREFIX)
        root.num_nodes += len(made)
        self.num_nodes += len(made)
        if not root.num_nodes:
            self._forget(root)

    def release(self, path: Sequence[PrefixNode]) -> None:
        """A sequence gives its references back; what nobody uses any more may be evicted."""
        if not path:
            return
        now_s, cost = self._clock.now_s, page_cost(self._costs.prefix_page_s(), 1)
        for node in path:
            node.num_refs -= 1
            if not node.num_refs:
                self.num_idle += 1
                node.last_use_s = now_s
                node.page_cost = cost
        last = path[-1]
        if not last.is_evictable:
            return
        if last.root.is_dropped:
            self._remove_branch(last)
        else:
            self._offer(last)

    def evict(self, leaf: PrefixNode, bound: float, max_pages: int) -> int:
        """Free the page of an idle leaf that the evictor gave out, and return how many were freed.

        With it leave those before it that become idle leaves by that and whose key is under the
        `bound`, up to `max_pages` in all: what a request leaves behind mostly goes as a whole.
        """
        policy, evicted = self._evictor.policy, self._odds.evicted
        pages: list[int] = []
        node: PrefixNode = leaf
        root = leaf.root
        root.idle_leaves.pop(leaf, None)
        while True:
            parent = node.parent
            del parent.children[node.content]
            pages.append(node.page)
            evicted(node.chain, was_hit=node.was_hit)
            if not isinstance(parent, PrefixNode) or not parent.is_evictable:
                break
            node = parent
            if len(pages) == max_pages or node.entry or node.key(policy) >= bound:
                self._offer(node)
                break
        self._free(root, pages)
        return len(pages)

    def drop_adapter(self, adapter_id: str | None) -> None:
        """Let nobody find the adapter's pages any more; those in use go when they are released."""
        for root in self._roots.pop(adapter_id, _NO_ROOTS).values():
            root.is_dropped = True
            self._dropped[root] = None
            for leaf in list(root.idle_leaves):
                self._remove_branch(leaf)

    def adapter_came(self, adapter_id: str) -> None:
        """The adapter has pages: its prefixes are of use again."""
        self._resident.add(adapter_id)
        for root in self._roots.get(adapter_id, _NO_ROOTS).values():
            root.is_orphan = False  # their keys rise, which the evictor notices by itself

    def adapter_left(self, adapter_id: str) -> None:
        """The adapter has no pages: its prefixes are worth less until it is back."""
        self._resident.discard(adapter_id)
        for root in self._roots.get(adapter_id, _NO_ROOTS).values():
            root.is_orphan = True
            for leaf in root.idle_leaves:
                self._evictor.prefixes.offer(leaf)

    def idle_leaves(self) -> Iterator[PrefixNode]:
        """Yield all that could leave now."""
        for roots in self._roots.values():
            for root in roots.values():
                yield from root.idle_leaves

    def check(self) -> None:
        """Raise AssertionError if a page is lost, or a node misplaced or miscounted."""
        nodes: list[PrefixNode] = []
        assert all(self._roots.values()), "an adapter without trees is kept"
        kept = [root for roots in self._roots.values() for root in roots.values()]
        for root in (*kept, *self._dropped):
            below = list(root.nodes())
            assert below, "an empty tree is kept"
            assert len(below) == root.num_nodes, "the count of a tree's nodes is off"
            assert all(node.root is root for node in below), "a node of another tree"
            assert root.is_dropped == (root in self._dropped), "a dropped tree can be found"
            leaves = {node for node in below if node.is_evictable}
            assert leaves == set(root.idle_leaves), "an idle leaf is lost"
            assert not (leaves and root.is_dropped), "a dropped tree keeps idle pages"
            is_orphan = root.adapter_id is not None and root.adapter_id not in self._resident
            assert root.is_dropped or root.is_orphan == is_orphan, "an orphan is not known as one"
            nodes += below
        for node in nodes:
            refs = sum(child.num_refs for child in node.children.values())
            assert node.num_refs >= refs, "a page is used without the one before it"
            for content, child in node.children.items():
                assert child.parent is node, "a child of two"
                assert child.content == content, "a child under a wrong name"
                assert len(array("i", content)) == self.page_tokens, "a node of a part of a page"
        assert len(nodes) == self.num_nodes, "the count of nodes is off"
        assert self.num_nodes == self._allocator.num_held(PageUse.PREFIX), "prefix pages leaked"
        assert len({node.page for node in nodes}) == len(nodes), "two nodes share a page"
        idle = sum(not node.num_refs for node in nodes)
        assert idle == self.num_idle, "the count of idle nodes is off"

    def _root(self, adapter_id: str | None, salt: str) -> PrefixRoot:
        roots = self._roots.setdefault(adapter_id, {})
        root = roots.get(salt)
        if root is None:
            is_orphan = adapter_id is not None and adapter_id not in self._resident
            root = roots[salt] = PrefixRoot(adapter_id, salt, is_orphan=is_orphan)
        return root

    def _forget(self, root: PrefixRoot) -> None:
        """An empty tree, which is not dropped, goes."""
        roots = self._roots[root.adapter_id]
        del roots[root.salt]
        if not roots:
            del self._roots[root.adapter_id]

    def _offer(self, leaf: PrefixNode) -> None:
        leaf.root.idle_leaves[leaf] = None
        self._evictor.prefixes.offer(leaf)

    def _remove(self, leaf: PrefixNode) -> None:
        del leaf.parent.children[leaf.content]
        leaf.root.idle_leaves.pop(leaf, None)
        self._evictor.prefixes.withdraw(leaf)
        self._free(leaf.root, (leaf.page,))

    def _free(self, root: PrefixRoot, pages: Sequence[int]) -> None:
        """Free the pages of idle nodes that were taken out of a tree."""
        root.num_nodes -= len(pages)
        self.num_nodes -= len(pages)
        self.num_idle -= len(pages)
        self._allocator.free(pages)
        if not root.num_nodes:
            if root.is_dropped:
                del self._dropped[root]
            else:
                self._forget(root)

    def _remove_branch(self, leaf: PrefixNode) -> None:
        """Remove an idle leaf and all that becomes one by that."""
        node: PrefixNode | PrefixRoot = leaf
        while isinstance(node, PrefixNode) and node.is_evictable:
            self._remove(node)
            node = node.parent


def _content(token_ids: Sequence[int]) -> bytes:
    """Return what a page of these tokens is found by: bytes, which know their hash and hold on to
    no objects, where a tuple would keep an integer alive for every token of the pool.
    """
    return array("i", token_ids).tobytes()
