"""What Responses, Messages, embeddings and tokens answer, for OpenAPI; see `answer_schemas`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from loraplex_server.api.answer_schemas import Timings


class ResponseUsage(BaseModel):
    """How many tokens it cost."""

    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class ResponseItem(BaseModel):
    """A message or a call of a function; other fields go by `type`."""

    id: str
    type: Literal["message", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponseAnswer(BaseModel):
    """Of `/v1/responses`: beside these, what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, Any] | None
    output: list[ResponseItem]
    usage: ResponseUsage


class MessageBlock(BaseModel):
    """Text or a call of a tool; other fields go by `type`."""

    type: Literal["text", "tool_use"]


class MessageUsage(BaseModel):
    """How many tokens it cost; those read from the cache are counted apart."""

    input_tokens: int = Field(ge=0)
    cache_read_input_tokens: int = Field(ge=0)
    cache_creation_input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)


class MessageAnswer(BaseModel):
    """Of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class CountAnswer(BaseModel):
    """Of `/v1/messages/count_tokens`."""

    input_tokens: int = Field(ge=0)


class EmbeddingAnswer(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int = Field(ge=0)
    embedding: list[float] | str = Field(description="base64 of float32, where asked for")


class EmbeddingUsage(BaseModel):
    """How many tokens it cost."""

    prompt_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class EmbeddingListAnswer(BaseModel):
    """Of `/v1/embeddings`, in the order of `input`."""

    object: Literal["list"]
    data: list[EmbeddingAnswer]
    model: str
    usage: EmbeddingUsage
    metrics: Timings


class TokenizeAnswer(BaseModel):
    """Of `/tokenize`."""

    count: int = Field(ge=0)
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    """Of `/detokenize`."""

    prompt: str
