"""Adapters, their versions, and what became of them."""

from __future__ import annotations

from typing import Any

from loraplex.types.base import ApiModel, Page


class ReportEntry(ApiModel):
    """What became of one field or tensor of an adapter.

    Attributes:
        subject: Its name.
        verdict: "applied", "folded" (converted exactly), "no effect" or "refused".
        detail: How, or why.
    """

    subject: str
    verdict: str
    detail: str = ""
    kind: str = "adapter"


class Adapter(ApiModel):
    """One registered adapter.

    Attributes:
        id: "sha256:<hex>" of its canonical tensors and config: the same content, the same id.
        base_model: The base model it was trained on, by the id the server serves it under.
        rank_max: The largest rank of any of its projections.
        size_bytes: Of its files on disk.
        pool_pages: Pages it takes in the memory pool while it is resident.
        created: Unix time in seconds.
        state: "registered" (on disk), "host" (in host memory), "loading" or "resident" (in the
            pool).
        version: Counts the versions of its name from 1.
        current: Whether the name alone stands for this version.
        native_bytes: Of the uploaded files, where the weights had to be computed from them.
        self_test_error: The largest relative difference from dense arithmetic, None if not tested.
        source: "upload", or where the server fetched it.
        last_used: Unix time in seconds, up to a minute late; None if it was never used.
        pinned: It stays in the pool once it is there, and does not expire.
        ttl_s: It is deleted so long after its last use; None for never.
        defaults: What its requests get where they do not say otherwise.
        owner: The tenant it belongs to; "" is everybody's.
        readers: The tenants that may use it besides its owner; "*" is all.
        report: What became of each field and tensor of the upload; of `get` only.
    """

    object: str = "adapter"
    name: str
    id: str
    base_model: str
    rank_max: int
    target_modules: list[str]
    size_bytes: int
    pool_pages: int
    created: int
    state: str
    version: int = 1
    current: bool = True
    native_bytes: int = 0
    self_test_error: float | None = None
    source: str = "upload"
    last_used: int | None = None
    pinned: bool = False
    ttl_s: int | None = None
    defaults: dict[str, Any] = {}
    owner: str = ""
    readers: list[str] = []
    report: list[ReportEntry] = []


class AdapterVersions(Page[Adapter]):
    """One page of GET /v1/adapters/{name}/versions, newest first."""


class AdapterValidation(ApiModel):
    """The answer of POST /v1/adapters/validate.

    Attributes:
        valid: The server would register it.
        reasons: Why it would not.
        adapter: What would be kept of it.
        report: What would become of each of its fields and tensors.
    """

    valid: bool
    reasons: list[str] = []
    adapter: dict[str, Any] | None = None
    report: list[ReportEntry] = []


class AdapterPage(Page[Adapter]):
    """One page of GET /v1/adapters."""


class FreedBytes(ApiModel):
    """What an adapter took of the memory pool (prefixes included), host memory and disk."""

    pool_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


class AdapterDeleted(ApiModel):
    """The answer of DELETE /v1/adapters/{name}.

    Attributes:
        id: The content that the name, or the version, stood for.
        freed: What came free by it.
    """

    name: str
    id: str
    deleted: bool
    freed: FreedBytes = FreedBytes()


class AdapterPrefetch(ApiModel):
    """The answer of POST /v1/adapters/{name}/prefetch.

    Attributes:
        tier: Where the adapter was when the server was asked: "resident" (in the pool), "loading",
            "host" (in host memory) or "disk".
    """

    name: str
    id: str
    tier: str
