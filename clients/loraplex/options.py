"""The request fields of completions and chat, as keyword arguments a type checker knows.

None means "not given": the server's default holds. The server refuses unknown fields by name;
`extra_body` sends a field that this version of the SDK does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Required, TypeAlias, TypedDict

from loraplex.types import ChatMessage

Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages: TypeAlias = Iterable[Mapping[str, Any] | ChatMessage]


class StreamOptions(TypedDict, total=False):
    """What a stream carries besides text; `continuous_usage_stats` counts in every chunk."""

    include_usage: bool
    continuous_usage_stats: bool


class StructuredOutputs(TypedDict, total=False):
    """What an answer must look like; exactly one of these."""

    json: Mapping[str, Any] | str
    regex: str
    choice: Sequence[str]
    grammar: str
    json_object: bool


class ResponseFormat(TypedDict, total=False):
    """OpenAI's word for it: `type` is "text", "json_object" or "json_schema"."""

    type: Required[str]
    json_schema: Mapping[str, Any]


class WeightedAdapter(TypedDict, total=False):
    """One adapter of a mixture; `weight` is a factor on all that it adds, 1 by default."""

    name: Required[str]
    weight: float


class SamplingOptions(TypedDict, total=False):
    """The fields that completions and chat share.

    Those beyond OpenAI's have the names and meanings of vLLM's: top_k, min_p, repetition_penalty,
    min_tokens, stop_token_ids, include_stop_str_in_output, ignore_eos, priority (lower is served
    first), cache_salt (only what was asked with the same is found cached) and *_special_tokens. Two
    are loraplex's own: deadline_s, seconds until the whole answer is due, and ttft_slo_s, seconds
    until its first token is: an answer that would come later is refused with a RateLimitError,
    which a client with `max_retries` tries again when it was told.

    adapter_id names an adapter where `model` is the base model, as LoRAX's field does; lora_path is
    SGLang's word for the same. adapter_scale is a factor on all that the adapter adds; adapters
    mixes several: what they add, times their weights, is added up. models, in place of `model`,
    asks several adapters the same: the answer has the choices of each, in that order. What is not
    given may have a default of the adapter's own; for the server's instead, send null with
    `extra_body`.
    """

    models: Sequence[str] | None
    adapter_id: str | None
    lora_path: str | Sequence[str] | None
    adapter_scale: float | None
    adapters: Sequence[WeightedAdapter] | None
    max_tokens: int | None
    min_tokens: int | None
    n: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    add_special_tokens: bool | None
    skip_special_tokens: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    stream_options: StreamOptions | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    truncate_prompt_tokens: int | None
    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    user: str | None
    cache_salt: str | None
    priority: int | None
    deadline_s: float | None
    ttft_slo_s: float | None
    extra_body: Mapping[str, Any] | None


class CompletionOptions(SamplingOptions, total=False):
    """The fields of POST /v1/completions besides model, prompt and stream."""

    best_of: int | None
    echo: bool | None
    logprobs: int | None


class ChatOptions(SamplingOptions, total=False):
    """The fields of POST /v1/chat/completions besides model, messages and stream."""

    logprobs: bool | None
    top_logprobs: int | None
    max_completion_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


class EmbeddingOptions(TypedDict, total=False):
    """The fields of POST /v1/embeddings besides model and input."""

    dimensions: int | None
    user: str | None
    cache_salt: str | None
    extra_body: Mapping[str, Any] | None


class TokenizeOptions(TypedDict, total=False):
    """The fields of POST /tokenize besides model and what is to be tokenized.

    The last two are for messages.
    """

    add_special_tokens: bool | None
    return_token_strs: bool | None
    add_generation_prompt: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    extra_body: Mapping[str, Any] | None
