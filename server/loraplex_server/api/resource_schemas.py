"""What endpoints of models and adapters answer, and the form of uploads, for OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ModelAnswer(BaseModel):
    """The base model, or an adapter: then `parent` is the base and `root` the content id."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelListAnswer(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelAnswer]


class ModelDeletedAnswer(BaseModel):
    """As OpenAI's."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class AdapterAnswer(BaseModel):
    """One version of an adapter."""

    object: Literal["adapter"]
    name: str
    id: str = Field(pattern="^sha256:[0-9a-f]{64}$")
    version: int = Field(ge=1)
    current: bool
    base_model: str
    rank_max: int
    target_modules: list[str]
    size_bytes: int
    native_bytes: int
    pool_pages: int
    self_test_error: float | None
    source: str
    created: int | float
    last_used: int | float | None
    pinned: bool
    ttl_s: int | None
    defaults: dict[str, Any]
    owner: str = Field(description="tenant; empty for nobody's")
    readers: list[str]
    state: Literal["resident", "loading", "host", "registered"]


class AdapterReportAnswer(AdapterAnswer):
    """With what became of each of its tensors and fields."""

    report: list[Any]


class AdapterListAnswer(BaseModel):
    """A page of adapters by name."""

    object: Literal["list"]
    data: list[AdapterAnswer]
    has_more: bool
    last: str | None = Field(description="pass it as `after` for the next page")


class VersionListAnswer(BaseModel):
    """A page of versions, newest first."""

    object: Literal["list"]
    data: list[AdapterAnswer]
    has_more: bool
    last: int | None = Field(description="pass it as `after` for the next page")


class FreedAnswer(BaseModel):
    """What a deletion gave back."""

    pool_bytes: int
    host_bytes: int
    disk_bytes: int


class AdapterDeletedAnswer(BaseModel):
    """After all it took is free."""

    object: Literal["adapter.deleted"]
    name: str
    id: str
    deleted: Literal[True]
    freed: FreedAnswer


class PrefetchAnswer(BaseModel):
    """Where the adapter was when the hint came."""

    object: Literal["adapter.prefetch"]
    name: str
    id: str
    tier: Literal["resident", "loading", "host", "disk"]


class ValidationAnswer(BaseModel):
    """A judgement; without reasons, it would be accepted."""

    object: Literal["adapter.validation"]
    valid: bool
    reasons: list[str]
    adapter: dict[str, Any] | None
    report: list[Any]


class SglangAnswer(BaseModel):
    """As SGLang's."""

    success: Literal[True]
    error_message: Literal[""]
    loaded_adapters: dict[str, str]


class ValidationForm(BaseModel):
    """Files to judge: the adapter's own, or one archive of them."""

    files: list[bytes] = Field(default_factory=list, description="adapter_config.json and weights")
    archive: bytes | None = Field(default=None, description="zip or tar")
    check_base: bool = Field(default=True, description="refuse adapters of another base model")


class UploadForm(ValidationForm):
    """Files to register, and what goes with them."""

    name: str = Field(min_length=1)
    replace: bool = False
    expected_id: str | None = Field(default=None, pattern="^sha256:[0-9a-f]{64}$")
    ttl_s: int | None = Field(default=None, ge=1, description="JSON")
    defaults: dict[str, Any] | None = Field(default=None, description="JSON")
