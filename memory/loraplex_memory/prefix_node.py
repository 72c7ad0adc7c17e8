"""The nodes of the prefix cache's trees: plain links and counts, kept true by the cache."""

from __future__ import annotations

from collections.abc import Iterator

from loraplex_memory.eviction import EvictionPolicy
from loraplex_memory.lazy_heap import Evictable


class PrefixRoot:
    """The empty prefix under one adapter and one salt.

    Attributes:
        is_orphan: the adapter is not in the pool.
        is_dropped: nobody finds it any more; its nodes go when their users do.
        idle_leaves: what could leave now, in the order in which it became idle.
    """

    __slots__ = (
        "adapter_id",
        "chain",
        "children",
        "idle_leaves",
        "is_dropped",
        "is_orphan",
        "num_nodes",
        "salt",
    )

    def __init__(self, adapter_id: str | None, salt: str, *, is_orphan: bool) -> None:
        self.adapter_id = adapter_id
        self.salt = salt
        self.chain = hash((adapter_id, salt))
        self.children: dict[bytes, PrefixNode] = {}
        self.idle_leaves: dict[PrefixNode, None] = {}
        self.num_nodes = 0
        self.is_orphan = is_orphan
        self.is_dropped = False

    def nodes(self) -> Iterator[PrefixNode]:
        """Yield all nodes of the tree, parents before their children."""
        stack = list(self.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


class PrefixNode(Evictable):
    """One page that holds the keys and values of its tokens after those of its ancestors.

    Attributes:
        content: its tokens, as the prefix cache writes them.
        chain: hash of adapter, salt and all tokens up to the end of the page; of use for statistics
            only, where it does not matter that two contents may have the same.
        use_score: see `usage`.
        was_hit: somebody asked for it after it was made.
    """

    __slots__ = (
        "chain",
        "children",
        "content",
        "last_use_s",
        "num_refs",
        "page",
        "page_cost",
        "parent",
        "root",
        "use_score",
        "was_hit",
    )

    def __init__(
        self,
        root: PrefixRoot,
        parent: PrefixNode | PrefixRoot,
        content: bytes,
        page: int,
        chain: int,
        use_score: float,
        *,
        was_hit: bool,
    ) -> None:
        super().__init__()
        self.root = root
        self.parent = parent
        self.content = content
        self.page = page
        self.children: dict[bytes, PrefixNode] = {}
        self.num_refs = 1
        self.chain = chain
        self.use_score = use_score
        self.was_hit = was_hit
        self.last_use_s = 0.0
        self.page_cost = 0.0

    @property
    def is_evictable(self) -> bool:
        return not self.num_refs and not self.children

    @property
    def spared_as(self) -> str | None:
        return None

    def key(self, policy: EvictionPolicy) -> float:
        return policy.prefix_key(
            last_use_s=self.last_use_s,
            use_score=self.use_score,
            page_cost=self.page_cost,
            is_orphan=self.root.is_orphan,
        )
