"""The names that requests can put in `model`."""

from __future__ import annotations

from loraplex.types.base import ApiModel


class Model(ApiModel):
    """A name that requests can put in `model`.

    Attributes:
        parent: The base model's id when this is an adapter, None when it is the base.
        root: Where the weights come from; an adapter's content id.
    """

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(ApiModel):
    """The answer of GET /v1/models."""

    data: list[Model]


class ModelDeleted(ApiModel):
    """The answer of DELETE /v1/models/{id}."""

    id: str
    deleted: bool
