"""What the server answers, as pydantic models.

Fields the SDK does not know are kept (`extra="allow"`), and what a server may leave out is
optional, so an older SDK reads a newer server. Closed sets of words (states, finish reasons) are
plain strings for the same reason.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """Base of every response."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class PromptTokensDetails(ApiModel):
    """Where the prompt's tokens came from.

    Attributes:
        cached_tokens: Those the server had computed before, for a prompt that began alike.
    """

    cached_tokens: int = 0


class Usage(ApiModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0


class Answer(ApiModel):
    """What completions, chat completions and the chunks of both have in common."""

    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None

    @property
    @abstractmethod
    def text(self) -> str:
        """The text of the first choice (of a chunk: what it adds to the first choice)."""


class CompletionLogprobs(ApiModel):
    """Log-probabilities of a completion: parallel lists with one entry per token."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(ApiModel):
    """One answer of a completion, or what one chunk adds to it.

    Attributes:
        finish_reason: "stop" or "length"; None while the answer goes on.
    """

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(Answer):
    """The answer of POST /v1/completions, and, with partial choices, a chunk of its stream."""

    choices: list[CompletionChoice]

    @property
    def text(self) -> str:
        """The text of the first choice, or what this chunk adds to it."""
        return next((choice.text for choice in self.choices if choice.index == 0), "")


class CompletionChunk(Completion):
    """One event of a completion stream; `usage` comes with the last, which has no choices."""


class TopLogprob(ApiModel):
    """One token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """One chosen token, with the likeliest others."""

    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(ApiModel):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob] | None = None


class ChatMessage(ApiModel):
    """One turn of a conversation. An answer's message can go back into `messages` as it is."""

    role: str
    content: str | None = None


class ChatChoice(ApiModel):
    """One answer of a chat completion. `finish_reason` is "stop" or "length"."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Answer):
    """The answer of POST /v1/chat/completions."""

    choices: list[ChatChoice]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return next((choice.message.content or "" for choice in self.choices), "")


class ChatDelta(ApiModel):
    """What one chunk adds to a message; `role` comes with the first."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(ApiModel):
    """What one chunk adds to one answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(Answer):
    """One event of a chat stream; `usage` comes with the last, which has no choices."""

    choices: list[ChatChunkChoice]

    @property
    def text(self) -> str:
        """What this chunk adds to the text of the first choice."""
        return next((c.delta.content or "" for c in self.choices if c.index == 0), "")


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


class ReportEntry(ApiModel):
    """What became of one field or tensor of an adapter.

    Attributes:
        subject: Its name.
        verdict: "applied", "folded" (converted exactly), "no effect" or "refused".
        detail: How, or why.
    """

    subject: str
    verdict: str
    detail: str = ""
    kind: str = "adapter"


class Adapter(ApiModel):
    """One registered adapter.

    Attributes:
        id: "sha256:<hex>" of its canonical tensors and config: the same content, the same id.
        base_model: The base model it was trained on, by the id the server serves it under.
        rank_max: The largest rank of any of its projections.
        size_bytes: Of its files on disk.
        pool_pages: Pages it takes in the memory pool while it is resident.
        created: Unix time in seconds.
        state: "registered" (on disk), "host" (in host memory), "loading" or "resident" (in the
            pool).
        version: Counts the versions of its name from 1.
        current: Whether the name alone stands for this version.
        native_bytes: Of the uploaded files, where the weights had to be computed from them.
        self_test_error: The largest relative difference from dense arithmetic, None if not tested.
        source: "upload", or where the server fetched it.
        last_used: Unix time in seconds, up to a minute late; None if it was never used.
        pinned: It stays in the pool once it is there, and does not expire.
        ttl_s: It is deleted so long after its last use; None for never.
        defaults: What its requests get where they do not say otherwise.
        report: What became of each field and tensor of the upload; of `get` only.
    """

    object: str = "adapter"
    name: str
    id: str
    base_model: str
    rank_max: int
    target_modules: list[str]
    size_bytes: int
    pool_pages: int
    created: int
    state: str
    version: int = 1
    current: bool = True
    native_bytes: int = 0
    self_test_error: float | None = None
    source: str = "upload"
    last_used: int | None = None
    pinned: bool = False
    ttl_s: int | None = None
    defaults: dict[str, Any] = {}
    report: list[ReportEntry] = []


class AdapterVersions(ApiModel):
    """One page of GET /v1/adapters/{name}/versions, newest first; `last` is the next's cursor."""

    data: list[Adapter]
    has_more: bool = False
    last: int | None = None


class AdapterValidation(ApiModel):
    """The answer of POST /v1/adapters/validate.

    Attributes:
        valid: The server would register it.
        reasons: Why it would not.
        adapter: What would be kept of it.
        report: What would become of each of its fields and tensors.
    """

    valid: bool
    reasons: list[str] = []
    adapter: dict[str, Any] | None = None
    report: list[ReportEntry] = []


class AdapterPage(ApiModel):
    """One page of GET /v1/adapters; `last` is the cursor of the next."""

    data: list[Adapter]
    has_more: bool = False
    last: str | None = None


class FreedBytes(ApiModel):
    """What an adapter took of the memory pool (prefixes included), host memory and disk."""

    pool_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


class AdapterDeleted(ApiModel):
    """The answer of DELETE /v1/adapters/{name}.

    Attributes:
        id: The content that the name, or the version, stood for.
        freed: What came free by it.
    """

    name: str
    id: str
    deleted: bool
    freed: FreedBytes = FreedBytes()


class AdapterPrefetch(ApiModel):
    """The answer of POST /v1/adapters/{name}/prefetch.

    Attributes:
        tier: Where the adapter was when the server was asked: "resident" (in the pool), "loading",
            "host" (in host memory) or "disk".
    """

    name: str
    id: str
    tier: str


class PageHolder(ApiModel):
    """An adapter, or the base model, with pages in the pool.

    Attributes:
        id: None for the base model.
        name: None when its last name was deleted while in use.
        weight_pages: Pages of its weights; None while they are being filled.
        prefix_pages: Pages of the prefix cache that hold what it computed.
        state: As of `AdapterPrefetch.tier`.
    """

    id: str | None
    name: str | None
    weight_pages: int | None = None
    prefix_pages: int = 0
    state: str = ""


class HostAdapter(ApiModel):
    """An adapter in host memory. `name` is None when its last name was deleted."""

    id: str
    name: str | None


class HostTier(ApiModel):
    """What host memory keeps near the pool. Its adapters may be in the pool as well."""

    bytes: int = 0
    capacity_bytes: int = 0
    adapters: list[HostAdapter] = []


class Pool(ApiModel):
    """Who holds the pages of the memory pool.

    `kv + prefix_used + prefix_idle + adapters + free == num_pages`.

    Attributes:
        kv: Pages that one running sequence has for itself.
        prefix_used: Pages of the prefix cache that running sequences refer to.
        prefix_idle: Pages of the prefix cache that nobody refers to; as good as free.
        adapters: Pages of adapters' weights, those being filled included.
    """

    num_pages: int
    page_bytes: int
    page_tokens: int = 0
    kv: int
    prefix_used: int = 0
    prefix_idle: int = 0
    adapters: int
    free: int
    by_adapter: list[PageHolder] = []
    host: HostTier = HostTier()


class Health(ApiModel):
    """Whether the server can answer. `status` is "ok", or says what it is doing instead."""

    status: str

    @property
    def is_ok(self) -> bool:
        """True when requests will be served."""
        return self.status == "ok"
