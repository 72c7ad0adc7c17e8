"""Text and vectors from a model, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from loraplex.calls.call import Call, body_of
from loraplex.options import (
    ChatOptions,
    CompletionOptions,
    EmbeddingOptions,
    Messages,
    Prompt,
    TokenizeOptions,
)
from loraplex.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Detokenized,
    EmbeddingList,
    Tokenized,
)


def create_completion(
    model: str | None, prompt: Prompt, options: CompletionOptions
) -> Call[Completion]:
    """POST /v1/completions."""
    body = body_of({"model": model, "prompt": prompt}, options)
    return Call("POST", "/v1/completions", Completion, json=body)


def stream_completion(
    model: str | None, prompt: Prompt, options: CompletionOptions
) -> Call[CompletionChunk]:
    """POST /v1/completions with stream=true."""
    body = body_of({"model": model, "prompt": prompt, "stream": True}, options)
    return Call("POST", "/v1/completions", CompletionChunk, json=body, is_stream=True)


def create_chat(
    model: str | None, messages: Messages, options: ChatOptions
) -> Call[ChatCompletion]:
    """POST /v1/chat/completions."""
    body = body_of({"model": model, "messages": _turns(messages)}, options)
    return Call("POST", "/v1/chat/completions", ChatCompletion, json=body)


def stream_chat(
    model: str | None, messages: Messages, options: ChatOptions
) -> Call[ChatCompletionChunk]:
    """POST /v1/chat/completions with stream=true."""
    body = body_of({"model": model, "messages": _turns(messages), "stream": True}, options)
    return Call("POST", "/v1/chat/completions", ChatCompletionChunk, json=body, is_stream=True)


def create_embeddings(model: str, inputs: Prompt, options: EmbeddingOptions) -> Call[EmbeddingList]:
    """POST /v1/embeddings."""
    body = body_of({"model": model, "input": inputs}, options)
    return Call("POST", "/v1/embeddings", EmbeddingList, json=body)


def tokenize(
    prompt: str | None, messages: Messages | None, model: str | None, options: TokenizeOptions
) -> Call[Tokenized]:
    """POST /tokenize."""
    turns = None if messages is None else _turns(messages)
    body = body_of({"model": model, "prompt": prompt, "messages": turns}, options)
    return Call("POST", "/tokenize", Tokenized, json=body)


def detokenize(tokens: Sequence[int], model: str | None) -> Call[Detokenized]:
    """POST /detokenize."""
    body = body_of({"model": model, "tokens": list(tokens)}, {})
    return Call("POST", "/detokenize", Detokenized, json=body)


def _turns(messages: Messages) -> list[Mapping[str, Any]]:
    """Return messages as JSON values; an earlier answer's message may be among them."""
    return [
        turn.model_dump(exclude_none=True) if isinstance(turn, BaseModel) else turn
        for turn in messages
    ]
