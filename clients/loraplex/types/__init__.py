"""What the server answers, as pydantic models: one file per noun."""

from __future__ import annotations

from loraplex.types.account import ApiKey, AuditEntry, CreatedKey, KeyRevoked, UsageRecord
from loraplex.types.adapter import (
    Adapter,
    AdapterDeleted,
    AdapterPage,
    AdapterPrefetch,
    AdapterValidation,
    AdapterVersions,
    FreedBytes,
    ReportEntry,
)
from loraplex.types.answer import Answer, AnswerTimes, PromptTokensDetails, Usage
from loraplex.types.base import ApiModel, Page
from loraplex.types.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    TopLogprob,
)
from loraplex.types.completion import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
)
from loraplex.types.embedding import Embedding, EmbeddingList
from loraplex.types.health import Health, ServerVersion
from loraplex.types.metrics import Histogram, MetricFamily, Metrics, Sample
from loraplex.types.model import Model, ModelDeleted, ModelList
from loraplex.types.pool import HostAdapter, HostTier, PageHolder, Pool
from loraplex.types.tokens import Detokenized, Tokenized

__all__ = [
    "Adapter",
    "AdapterDeleted",
    "AdapterPage",
    "AdapterPrefetch",
    "AdapterValidation",
    "AdapterVersions",
    "Answer",
    "AnswerTimes",
    "ApiKey",
    "ApiModel",
    "AuditEntry",
    "ChatChoice",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionLogprobs",
    "CreatedKey",
    "Detokenized",
    "Embedding",
    "EmbeddingList",
    "FreedBytes",
    "FunctionCall",
    "Health",
    "Histogram",
    "HostAdapter",
    "HostTier",
    "KeyRevoked",
    "MetricFamily",
    "Metrics",
    "Model",
    "ModelDeleted",
    "ModelList",
    "Page",
    "PageHolder",
    "Pool",
    "PromptTokensDetails",
    "ReportEntry",
    "Sample",
    "ServerVersion",
    "TokenLogprob",
    "Tokenized",
    "ToolCall",
    "TopLogprob",
    "Usage",
    "UsageRecord",
]
