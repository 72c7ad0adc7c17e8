"""The answer of POST /v1/embeddings."""

from __future__ import annotations

from loraplex.types.answer import Usage
from loraplex.types.base import ApiModel


class Embedding(ApiModel):
    """The vector of one input, at the place `index` among them."""

    index: int
    embedding: list[float]


class EmbeddingList(ApiModel):
    """The vectors of all inputs, in their order."""

    model: str
    data: list[Embedding]
    usage: Usage | None = None

    @property
    def vectors(self) -> list[list[float]]:
        """The vectors alone."""
        return [item.embedding for item in self.data]
