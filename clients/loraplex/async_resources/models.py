"""The names that requests can put in `model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.calls import server
from loraplex.types import Model, ModelDeleted

if TYPE_CHECKING:
    from loraplex.async_client import AsyncClient


class AsyncModels:
    """The names that requests can put in `model`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Model]:
        """Return the base model and every adapter."""
        return (await self._client.send(server.list_models())).data

    async def retrieve(self, model_id: str) -> Model:
        """Return one of them.

        Raises:
            NotFoundError: No model or adapter has this name.
        """
        return await self._client.send(server.retrieve_model(model_id))

    async def delete(self, model_id: str) -> ModelDeleted:
        """Delete an adapter as OpenAI's client would; `adapters.delete` says more.

        Raises:
            NotFoundError: No adapter has this name.
        """
        return await self._client.send(server.delete_model(model_id))
