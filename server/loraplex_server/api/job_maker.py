"""What a request asks of one model, as a job: prompts encoded, fields checked, defaults filled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import anyio
import anyio.to_thread

from loraplex_scheduler.plan import Pooling
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.api.errors import ApiError, InvalidRequest
from loraplex_server.api.job import Job, Terms
from loraplex_server.api.model_names import Answerer
from loraplex_server.api.prompts import PromptEncoder, Truncation
from loraplex_server.api.request_defaults import default_len, fill_in
from loraplex_server.api.sampling import base_sampling, text_options
from loraplex_server.api.schemas import GenerationBody, RequestBody
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.text.assembler import TextOptions
from loraplex_server.text.errors import ChatTemplateFailed, TextError
from loraplex_server.text.time_limit import TookTooLong, run_within
from loraplex_server.text.vocabulary import Vocabulary

#: Texts longer than this are encoded in a thread: they would hold up every running stream.
_LONG_TEXT_CHARS: Final = 8192
#: For adapters' own chat templates, and encoding what they write.
_TEMPLATE_S: Final = 5.0
_MAX_TEMPLATES_AT_WORK: Final = 2


@dataclass(frozen=True)
class Demands:
    """What a conversation's template decides, which may be the adapter's own.

    Attributes:
        grammar: of the answer; None where the body's own fields decide.
        shows_special_tokens: the answer's text must have them, for whoever reads it.
    """

    grammar: str | None = None
    shows_special_tokens: bool = False


@dataclass(frozen=True)
class PromptWish:
    """The prompts of a request, before it is known who encodes them.

    Attributes:
        num_prompts: what `encode` will return.
        num_chars: text to encode, to decide where.
        encode: returns the prompts' token ids.
        is_chat: `encode` runs a chat template.
        runs_own_template: which the request brings itself.
        param: the field that holds them, for errors.
    """

    num_prompts: int
    num_chars: int
    encode: Callable[[PromptEncoder], list[list[int]]]
    is_chat: bool = field(default=False, kw_only=True)
    runs_own_template: bool = field(default=False, kw_only=True)
    param: str = field(default="prompt", kw_only=True)


@dataclass(frozen=True)
class Wish(PromptWish):
    """What an endpoint makes of its own fields.

    Attributes:
        max_tokens: as requested; `default_tokens` if not, and as many as fit if neither is set.
        logprobs: as `SamplingParams.logprobs`.
        grammar: as `SamplingParams.grammar`; None where the body decides.
        prompt_logprobs: as `SamplingParams.prompt_logprobs`; None where the body decides.
        is_prompt_only: see `Job`.
        demands: asked for once the prompts of a model are encoded.
    """

    max_tokens: int | None
    default_tokens: int | None
    logprobs: int | None
    grammar: str | None = None
    prompt_logprobs: int | None = None
    is_prompt_only: bool = False
    demands: Callable[[], Demands] = Demands


@dataclass(frozen=True)
class JobMaker:
    """Makes jobs; immutable."""

    engine: EngineHandle
    vocabulary: Vocabulary
    template_threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_TEMPLATES_AT_WORK)
    )

    async def generation(
        self, body: GenerationBody, terms: Terms, wish: Wish, job_id: str, answerer: Answerer
    ) -> Job:
        """Return the job of continuing prompts.

        Raises:
            ContextLengthExceeded, InvalidSampling, UnknownToken, ...: naming the field.
        """
        record = answerer.record
        defaults = (record.defaults if record else AdapterDefaults()).generation
        prompts = await self.encode(body, wish, record, answer_len=wish.max_tokens or 1)
        demands = wish.demands()
        if demands.shows_special_tokens:
            body = body.model_copy(update={"skip_special_tokens": False})
        max_tokens = self.limit(record).answer_len(
            requested=wish.max_tokens,
            default=default_len(body, defaults, wish.default_tokens),
            longest_prompt=max(map(len, prompts)),
        )
        body = fill_in(body, defaults, max_tokens=max_tokens)
        return Job(
            job_id=job_id,
            model=answerer.name,
            prompts=tuple(map(tuple, prompts)),
            n=body.num_samples,
            sampling=base_sampling(
                body,
                self.vocabulary,
                max_tokens=max_tokens,
                logprobs=wish.logprobs,
                prompt_logprobs=(
                    body.prompt_logprobs if wish.prompt_logprobs is None else wish.prompt_logprobs
                ),
                grammar=_grammar(body, wish, demands),
            ),
            text=text_options(body),
            adapters=answerer.adapters,
            terms=terms,
            is_prompt_only=wish.is_prompt_only,
        )

    async def pooling(
        self,
        body: RequestBody,
        terms: Terms,
        wish: PromptWish,
        job_id: str,
        answerer: Answerer,
        kind: Pooling,
    ) -> Job:
        """Return the job of turning prompts into embeddings; raises as `generation`."""
        prompts = await self.encode(body, wish, answerer.record, answer_len=1)
        return Job(
            job_id=job_id,
            model=answerer.name,
            prompts=tuple(map(tuple, prompts)),
            n=1,
            sampling=SamplingParams(max_tokens=1),
            text=TextOptions(),
            adapters=answerer.adapters,
            terms=terms,
            pooling=kind,
        )

    def limit(self, record: AdapterRecord | None) -> ContextLimit:
        """Return how many tokens a request to this adapter, or the base model, may have."""
        return ContextLimit.of(self.engine.info.max_model_len, record)

    async def encode(
        self,
        body: RequestBody | None,
        wish: PromptWish,
        record: AdapterRecord | None,
        *,
        answer_len: int = 1,
    ) -> list[list[int]]:
        """Return the prompts' token ids by the adapter's own templates.

        Args:
            body: None where nothing is to be computed: then prompts may have any length.
            answer_len: tokens that truncated prompts leave room for.

        Raises:
            ContextLengthExceeded, InvalidRequest, InvalidText, UnknownToken: naming the field.
        """
        limit = self.limit(record)
        defaults = record.defaults if record else AdapterDefaults()
        if body is None:
            return await self._run(wish, PromptEncoder(self.vocabulary, None, defaults), defaults)
        truncation = _truncation(body, limit, answer_len)
        encoder = PromptEncoder(self.vocabulary, limit, defaults, truncation)
        try:
            prompts = await self._run(wish, encoder, defaults)
            if not all(prompts):
                raise InvalidRequest("a prompt must have at least one token", param="prompt")
            limit.check_prompt(max(map(len, prompts)))
        except (ApiError, TextError) as error:
            if error.param == "prompt":
                error.param = wish.param
            raise
        return prompts

    async def _run(
        self, wish: PromptWish, encoder: PromptEncoder, defaults: AdapterDefaults
    ) -> list[list[int]]:
        """Encode where it holds nobody up."""
        num_chars = wish.num_chars + len(defaults.system_prompt or "")
        if wish.is_chat and (defaults.chat_template is not None or wish.runs_own_template):
            # A program of whoever brought it: it may take neither our threads nor for ever.
            return await anyio.to_thread.run_sync(
                _encode_by_template, wish, encoder, limiter=self.template_threads
            )
        if num_chars > _LONG_TEXT_CHARS:
            return await asyncio.to_thread(wish.encode, encoder)
        return wish.encode(encoder)


def _grammar(body: GenerationBody, wish: Wish, demands: Demands) -> str | None:
    """Return the one grammar that was asked for, if any."""
    if wish.grammar is None:
        return demands.grammar
    if demands.grammar is not None:
        raise InvalidRequest(
            "not together with a `tool_choice` that decides what the answer looks like",
            param=body.shape.param if body.shape else None,
        )
    return wish.grammar


def _truncation(body: RequestBody, limit: ContextLimit, answer_len: int) -> Truncation | None:
    num_tokens = body.truncate_prompt_tokens
    if num_tokens is None:
        return None
    if num_tokens == -1:
        num_tokens = max(1, limit.num_tokens - answer_len)
    return Truncation(num_tokens, keeps_end=body.truncation_side != "right")


def _encode_by_template(wish: PromptWish, encoder: PromptEncoder) -> list[list[int]]:
    try:
        return run_within(_TEMPLATE_S, lambda: wish.encode(encoder))
    except TookTooLong as error:
        raise ChatTemplateFailed(
            f"the chat template was stopped: {error}", param="messages"
        ) from error
