"""LoRAX's own `POST /generate` and `/generate_stream`, for its clients; see `lorax_schemas`."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_scheduler.plan import SampledToken
from loraplex_server.api.answer import Written
from loraplex_server.api.completions import completion_wish
from loraplex_server.api.error_table import error_body, shape_of
from loraplex_server.api.foreign_errors import foreign_error
from loraplex_server.api.front import Front, new_id
from loraplex_server.api.job import Job
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import shown_logprob
from loraplex_server.api.lorax_schemas import LoraxBody
from loraplex_server.api.usage import Usage
from loraplex_server.text.assembler import TextDelta
from loraplex_server.text.vocabulary import Vocabulary

_PATH: Final = "/generate"


def lorax_router(front: Front) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["LoRAX"])

    async def answer(body: LoraxBody, request: Request, *, is_stream: bool) -> Response:
        completion = body.as_completion(is_stream=is_stream)
        has_details = is_stream or bool(body.parameters.details)
        return await front.answer(
            completion,
            request,
            completion_wish(completion, default_tokens=None, logprobs=0 if has_details else None),
            new_id("gen"),
            lambda job: LoraxFormat(job, front.vocabulary, has_details=has_details),
        )

    @router.post(_PATH, response_model=None)
    async def generate(body: LoraxBody, request: Request) -> Response:
        """Continue `inputs`, by `parameters.adapter_id` or the base model."""
        return await answer(body, request, is_stream=False)

    @router.post("/generate_stream", response_model=None)
    async def generate_stream(body: LoraxBody, request: Request) -> Response:
        """Continue `inputs` as server-sent events, one for each token."""
        return await answer(body, request, is_stream=True)

    return router


class LoraxFormat:
    """Implements `AnswerFormat` in LoRAX's shapes; of one sequence."""

    stream_end: Final = b""

    def __init__(self, job: Job, vocabulary: Vocabulary, *, has_details: bool) -> None:
        self._job = job
        self._vocabulary = vocabulary
        self._has_details = has_details
        self._written = Written()

    def complete(self, sequences: list[Written], usage: Usage) -> dict[str, Any]:
        """See `AnswerFormat`."""
        written = sequences[0]
        body: dict[str, Any] = {"generated_text": written.text}
        if self._has_details:
            tokens = [self._token(token, self._text(token)) for token in written.tokens]
            body["details"] = {**self._details(written), "prefill": [], "tokens": tokens}
        return body

    def stream_head(self) -> bytes:
        """See `AnswerFormat`."""
        return b""

    def stream_delta(self, index: int, delta: TextDelta) -> bytes:
        """See `AnswerFormat`: the texts of all events together are the text, as clients join them.

        Text that was held back comes with the token that let it go, and the others' is empty.
        """
        self._written.add(delta)
        events = []
        for position, token in enumerate(delta.tokens, start=1):
            is_last = position == len(delta.tokens)
            is_end = is_last and delta.finish_reason is not None
            event = {
                "token": self._token(token, delta.text if is_last else ""),
                "generated_text": self._written.text if is_end else None,
                "details": self._details(self._written) if is_end else None,
            }
            events.append(b"data:" + compact(event).encode() + b"\n\n")
        return b"".join(events)

    def stream_tail(self, usage: Usage) -> bytes:
        """See `AnswerFormat`."""
        return b""

    def stream_error(self, error: Exception) -> bytes:
        """See `AnswerFormat`."""
        status = shape_of(type(error)).status
        _, body = foreign_error(_PATH, status, error_body(error)["error"])
        return b"data:" + compact(body).encode() + b"\n\n"

    def _details(self, written: Written) -> dict[str, Any]:
        sampling = self._job.sampling
        reason = "length"
        if written.finish_reason == "stop":
            reason = "eos_token" if written.stop_reason is None else "stop_sequence"
        return {
            "finish_reason": reason,
            "prompt_tokens": self._job.num_prompt_tokens,
            "generated_tokens": len(written.tokens),
            "seed": None if sampling.is_greedy else sampling.seed,
        }

    def _token(self, token: SampledToken, text: str) -> dict[str, Any]:
        assert token.logprobs is not None, "the engine reports what the sampling asked for"
        return {
            "id": token.token_id,
            "text": text,
            "logprob": shown_logprob(token.logprobs.logprob),
            "special": token.token_id in self._vocabulary.special_ids,
        }

    def _text(self, token: SampledToken) -> str:
        return self._vocabulary.token_bytes(token.token_id).decode("utf-8", "replace")
