"""Who holds the memory pool."""

from __future__ import annotations

from loraplex.types.base import ApiModel


class PageHolder(ApiModel):
    """An adapter, or the base model, with pages in the pool.

    Attributes:
        id: None for the base model.
        name: None when its last name was deleted while in use.
        weight_pages: Pages of its weights; None while they are being filled.
        prefix_pages: Pages of the prefix cache that hold what it computed.
        state: As of `AdapterPrefetch.tier`.
    """

    id: str | None
    name: str | None
    weight_pages: int | None = None
    prefix_pages: int = 0
    state: str = ""


class HostAdapter(ApiModel):
    """An adapter in host memory. `name` is None when its last name was deleted."""

    id: str
    name: str | None


class HostTier(ApiModel):
    """What host memory keeps near the pool. Its adapters may be in the pool as well."""

    bytes: int = 0
    capacity_bytes: int = 0
    adapters: list[HostAdapter] = []


class Pool(ApiModel):
    """Who holds the pages of the memory pool.

    `kv + prefix_used + prefix_idle + adapters + free == num_pages`.

    Attributes:
        kv: Pages that one running sequence has for itself.
        prefix_used: Pages of the prefix cache that running sequences refer to.
        prefix_idle: Pages of the prefix cache that nobody refers to; as good as free.
        adapters: Pages of adapters' weights, those being filled included.
    """

    num_pages: int
    page_bytes: int
    page_tokens: int = 0
    kv: int
    prefix_used: int = 0
    prefix_idle: int = 0
    adapters: int
    free: int
    by_adapter: list[PageHolder] = []
    host: HostTier = HostTier()
