"""`POST /v1/embeddings`: texts in, the model's final hidden states out, as one vector for each."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from loraplex_scheduler.plan import Pooling
from loraplex_server.api.answer import Written
from loraplex_server.api.completion_schemas import Prompts
from loraplex_server.api.completions import encode_prompts
from loraplex_server.api.errors import InvalidRequest
from loraplex_server.api.front import Front
from loraplex_server.api.job import Job
from loraplex_server.api.job_maker import PromptWish
from loraplex_server.api.schemas import RequestBody
from loraplex_server.api.usage import Usage


class EmbeddingBody(RequestBody):
    """The body of `POST /v1/embeddings`."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None


def embeddings_router(front: Front) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/embeddings", tags=["generation"], response_model=None)
    async def create_embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Turn each text into a vector, by the base model or an adapter."""
        add_special = body.add_special_tokens is not False
        wish = PromptWish(
            num_prompts=len(body.input),
            num_chars=sum(len(text) for text in body.input),
            encode=lambda encoder: encode_prompts(body.input, encoder, add_special=add_special),
            param="input",
        )
        kind = Pooling(body.pooling or "last")
        return await front.embed(body, request, wish, kind, lambda job: EmbeddingFormat(job, body))

    return router


class EmbeddingFormat:
    """Implements `CompleteFormat` in the shape of OpenAI's list of embeddings."""

    def __init__(self, job: Job, body: EmbeddingBody) -> None:
        self._job = job
        self._body = body

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `CompleteFormat`; raises InvalidRequest if the vectors have too few dimensions."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._shown(written)}
            for index, written in enumerate(sequences)
        ]
        num_tokens = usage["prompt_tokens"]
        return {
            "object": "list",
            "data": data,
            "model": self._job.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "metrics": usage.metrics,
        }

    def _shown(self, written: Written) -> str | list[float]:
        assert written.embedding is not None, "the engine pools what asks for it"
        vector = self._shortened(np.asarray(written.embedding, np.float32))
        if self._body.normalize is not False:
            length = float(np.linalg.norm(vector))
            vector = vector / length if length else vector
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        numbers: list[float] = vector.tolist()
        return numbers

    def _shortened(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        wanted = self._body.dimensions
        if wanted is None:
            return vector
        if wanted > len(vector):
            raise InvalidRequest(
                f"this model's embeddings have {len(vector)} dimensions, not {wanted}",
                param="dimensions",
            )
        return vector[:wanted]
