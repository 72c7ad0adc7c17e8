"""What the server is and how it does."""

from __future__ import annotations

from loraplex.calls.call import Call, segment
from loraplex.types import Health, Metrics, Model, ModelDeleted, ModelList, Pool, ServerVersion

_NOT_READY = frozenset({503})


def list_models() -> Call[ModelList]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", ModelList)


def retrieve_model(model_id: str) -> Call[Model]:
    """GET /v1/models/{id}."""
    return Call("GET", f"/v1/models/{segment(model_id)}", Model)


def delete_model(model_id: str) -> Call[ModelDeleted]:
    """DELETE /v1/models/{id}."""
    return Call("DELETE", f"/v1/models/{segment(model_id)}", ModelDeleted, is_repeatable=False)


def get_pool() -> Call[Pool]:
    """GET /v1/pool."""
    return Call("GET", "/v1/pool", Pool)


def get_metrics() -> Call[Metrics]:
    """GET /metrics."""
    return Call("GET", "/metrics", Metrics, accept="text/plain")


def get_health() -> Call[Health]:
    """GET /health. 503 is an answer: it says what the server is doing."""
    return Call("GET", "/health", Health, answer_statuses=_NOT_READY)


def get_ready() -> Call[Health]:
    """GET /ready, likewise."""
    return Call("GET", "/ready", Health, answer_statuses=_NOT_READY)


def get_version() -> Call[ServerVersion]:
    """GET /version."""
    return Call("GET", "/version", ServerVersion)
