"""LoRAX's own `POST /generate` and `/generate_stream`, for its clients; see `lorax_schemas`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.completions import completion_wish
from loraplex_server.api.dialogues import Dialogues
from loraplex_server.api.errors import InvalidRequest
from loraplex_server.api.front import Wish, new_id
from loraplex_server.api.job import Job
from loraplex_server.api.lorax_format import LoraxFormat
from loraplex_server.api.lorax_schemas import LoraxBody
from loraplex_server.api.timings import Headers
from loraplex_server.api.usage import Usage

LORAX_PATH: Final = "/generate"


def lorax_router(dialogues: Dialogues, base_name: str) -> APIRouter:
    """Return the endpoints.

    Args:
        base_name: what answers call the base model.
    """
    router = APIRouter(tags=["LoRAX"])
    front = dialogues.front

    def wish_of(body: LoraxBody, completion: CompletionBody, num_top: int | None) -> Wish:
        wish = completion_wish(completion, default_tokens=None, logprobs=num_top)
        if not body.parameters.apply_chat_template:
            return wish
        chat = dialogues.begin(_conversation(body.inputs)).wish()
        return replace(wish, encode=chat.encode, num_chars=chat.num_chars, is_chat=True)

    async def answer(body: LoraxBody, request: Request, *, is_stream: bool) -> Response:
        completion = body.as_completion(is_stream=is_stream)
        has_details = is_stream or bool(body.parameters.details)
        num_top = (body.parameters.return_k_alternatives or 0) if has_details else None
        jobs: list[Job] = []

        def make_format(job: Job) -> LoraxFormat:
            jobs.append(job)
            return LoraxFormat(job, body, front.vocabulary, has_details=has_details)

        return await front.answer(
            completion,
            request,
            wish_of(body, completion, num_top),
            new_id("gen"),
            make_format,
            more_headers=lambda usage: _headers(body, jobs[0], base_name, usage),
        )

    @router.post(LORAX_PATH, response_model=None)
    async def generate(body: LoraxBody, request: Request) -> Response:
        """Continue `inputs`, by `parameters.adapter_id` or the base model."""
        return await answer(body, request, is_stream=False)

    @router.post("/generate_stream", response_model=None)
    async def generate_stream(body: LoraxBody, request: Request) -> Response:
        """Continue `inputs` as server-sent events, one for each token."""
        return await answer(body, request, is_stream=True)

    return router


def _conversation(inputs: str) -> ChatBody:
    """Return `inputs` as a conversation: messages in JSON as LoRAX's are, or what a user says."""
    messages = _messages(inputs) or [{"role": "user", "content": inputs}]
    try:
        return ChatBody.model_validate({"model": "", "adapter_id": "", "messages": messages})
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"])
        raise InvalidRequest(f"`inputs`: not a conversation: {reason}", param="inputs") from error


def _messages(inputs: str) -> list[dict[str, Any]] | None:
    try:
        given = json.loads(inputs)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(given, list) and all(isinstance(item, dict) for item in given)
    return given if is_list else None


def _headers(body: LoraxBody, job: Job, base_name: str, usage: Usage) -> Headers:
    """Return LoRAX's headers of a complete answer; times in milliseconds but the first."""
    metrics = usage.metrics
    total_ms, queue_ms = metrics.get("total_time_ms", 0.0), metrics.get("queue_time_ms") or 0.0
    inference_ms = max(0.0, total_ms - queue_ms)
    num_generated = usage["completion_tokens"]
    shown = {
        "x-compute-time": f"{total_ms / 1000:g}",
        "x-compute-characters": len(body.inputs),
        "x-total-time": round(total_ms),
        "x-queue-time": round(queue_ms),
        "x-inference-time": round(inference_ms),
        "x-time-per-token": round(inference_ms / max(1, num_generated)),
        "x-time-to-first-token": round(metrics.get("time_to_first_token_ms", 0.0)),
        "x-prompt-tokens": usage["prompt_tokens"],
        "x-generated-tokens": num_generated,
        "x-total-tokens": usage["total_tokens"],
        "x-model-id": base_name,
    }
    if job.adapters:
        shown["x-adapter-id"] = job.model
    return [(name.encode(), str(value).encode("ascii", "replace")) for name, value in shown.items()]
