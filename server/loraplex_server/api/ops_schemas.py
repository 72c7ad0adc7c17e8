"""What operators and probes are answered, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class HealthAnswer(BaseModel):
    """Of `/health`."""

    status: Literal["ok", "unavailable"]
    engine: Literal["starting", "ready", "restarting", "stopped"]
    restarts: int = Field(ge=0, description="of the engine process")
    model: str


class ReadyAnswer(BaseModel):
    """Of `/ready`: why not, where it is not."""

    status: Literal["ready", "draining", "engine_starting", "engine_restarting", "engine_stopped"]


class LoadAnswer(BaseModel):
    """Of `/load`."""

    server_load: int = Field(ge=0, description="requests under way")
    running: int = Field(ge=0, description="sequences that the engine computes")
    waiting: int = Field(ge=0, description="sequences that wait for their turn or their adapter")


class PageHolder(BaseModel):
    """Who holds pages for longer than a request: an adapter, or the base model's prefixes."""

    id: str | None = Field(description="content id; null is the base model")
    name: str | None
    weight_pages: int | None = Field(description="null while it loads")
    prefix_pages: int
    state: Literal["resident", "loading", "host", "disk"]


class HostAdapter(BaseModel):
    """An adapter that is packed in host memory."""

    id: str
    name: str | None


class HostMemory(BaseModel):
    """The tier beside the pool."""

    bytes: int
    capacity_bytes: int
    adapters: list[HostAdapter]


class PoolAnswer(BaseModel):
    """Of `/v1/pool`: pages by use add up to `num_pages`."""

    num_pages: int
    page_bytes: int
    page_tokens: int
    kv: int
    prefix_used: int
    prefix_idle: int
    adapters: int
    free: int
    by_adapter: list[PageHolder]
    host: HostMemory
