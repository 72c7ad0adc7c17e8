"""What both generation endpoints do: find the model, encode, submit, and answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import anyio
import anyio.to_thread
from starlette.requests import HTTPConnection

from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.answer import AnswerFormat, GenerationAnswer
from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.api.errors import InvalidRequest
from loraplex_server.api.generations import Generations
from loraplex_server.api.job import Job, Terms
from loraplex_server.api.model_names import Answerer, ModelNames, ModelWish
from loraplex_server.api.principals import namespace_of
from loraplex_server.api.prompts import PromptEncoder
from loraplex_server.api.request_defaults import default_len, fill_in
from loraplex_server.api.sampling import base_sampling, text_options
from loraplex_server.api.schemas import GenerationBody
from loraplex_server.api.tenant_header import TenantHeader
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import EngineState
from loraplex_server.tenants.namespace import Namespace
from loraplex_server.text.errors import ChatTemplateFailed
from loraplex_server.text.time_limit import TookTooLong, run_within
from loraplex_server.text.vocabulary import Vocabulary

#: Texts longer than this are encoded in a thread: they would hold up every running stream.
_LONG_TEXT_CHARS: Final = 8192
#: For adapters' own chat templates, and encoding what they write.
_TEMPLATE_S: Final = 5.0
_MAX_TEMPLATES_AT_WORK: Final = 2


@dataclass(frozen=True)
class Wish:
    """What an endpoint makes of its own fields.

    Attributes:
        num_prompts: what `encode` will return.
        num_chars: text to encode, to decide where.
        encode: returns the prompts' token ids.
        max_tokens: as requested; `default_tokens` if not, and as many as fit if neither is set.
        grammar: of the answer, as `SamplingParams.grammar`; None where the body's own fields decide.
    """

    num_prompts: int
    num_chars: int
    encode: Callable[[PromptEncoder], list[list[int]]]
    max_tokens: int | None
    default_tokens: int | None
    logprobs: int | None
    is_chat: bool = False
    grammar: str | None = None


@dataclass(frozen=True)
class Front:
    """Shared by the generation endpoints; immutable."""

    engine: EngineHandle
    vocabulary: Vocabulary
    generations: Generations
    adapter_names: AdapterNames
    model_names: ModelNames
    tenant_header: TenantHeader
    template_threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_TEMPLATES_AT_WORK)
    )

    async def answer(
        self,
        body: GenerationBody,
        request: HTTPConnection,
        wish: Wish,
        job_id: str,
        make_format: Callable[[Job], AnswerFormat],
    ) -> GenerationAnswer:
        """Submit the request and return its answer to be.

        Raises:
            ModelNotFound, ContextLengthExceeded, QueueFull, ...: see the error table.
        """
        terms = Terms(
            tenant=self.tenant_header.account_of(request),
            priority=body.priority or 0,
            deadline_s=body.deadline_s,
            ttft_slo_s=body.ttft_slo_s,
        )
        self.generations.check_room(terms.tenant, wish.num_prompts * (body.n or 1))
        answerer = await self._acquire(body.model_wish, namespace_of(request))
        try:
            job = await self._job(body, terms, wish, job_id, answerer)
            generation = self.generations.start(job)
        except BaseException:
            if answerer.adapters:
                await asyncio.to_thread(answerer.release)
            raise
        return GenerationAnswer(
            generation,
            make_format(job),
            is_stream=bool(body.stream),
            is_engine_ready=lambda: self.engine.state is EngineState.READY,
        )

    async def _job(
        self, body: GenerationBody, terms: Terms, wish: Wish, job_id: str, answerer: Answerer
    ) -> Job:
        record = answerer.record
        limit = ContextLimit.of(self.engine.info.max_model_len, record)
        defaults = record.defaults if record else AdapterDefaults()
        prompts = await self._encode(wish, limit, defaults)
        max_tokens = limit.answer_len(
            requested=wish.max_tokens,
            default=default_len(body, defaults.generation, wish.default_tokens),
            longest_prompt=max(len(prompt) for prompt in prompts),
        )
        body = fill_in(body, defaults.generation, max_tokens=max_tokens)
        sampling = base_sampling(
            body, self.vocabulary, max_tokens=max_tokens, logprobs=wish.logprobs
        )
        return Job(
            job_id=job_id,
            model=answerer.name,
            prompts=tuple(map(tuple, prompts)),
            n=body.n or 1,
            sampling=sampling,
            text=text_options(body),
            adapters=answerer.adapters,
            terms=terms,
        )

    async def _encode(
        self, wish: Wish, limit: ContextLimit, defaults: AdapterDefaults
    ) -> list[list[int]]:
        encoder = PromptEncoder(self.vocabulary, limit, defaults)
        num_chars = wish.num_chars + len(defaults.system_prompt or "")
        if defaults.chat_template is not None and wish.is_chat:
            # A program of whoever registered it: it may take neither our threads nor for ever.
            prompts = await anyio.to_thread.run_sync(
                _encode_by_template, wish, encoder, limiter=self.template_threads
            )
        elif num_chars > _LONG_TEXT_CHARS:
            prompts = await asyncio.to_thread(wish.encode, encoder)
        else:
            prompts = wish.encode(encoder)
        if not all(prompts):
            raise InvalidRequest("a prompt must have at least one token", param="prompt")
        return prompts

    async def _acquire(self, wish: ModelWish, namespace: Namespace) -> Answerer:
        """Resolve who answers, once for the whole request."""
        if (base := self.model_names.base(wish)) is not None:
            return base
        acquiring = asyncio.ensure_future(
            asyncio.to_thread(self.model_names.acquire, wish, namespace)
        )
        try:
            answerer = await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            # The thread goes on and takes the lease; nobody else will give it back.
            acquiring.add_done_callback(_release)
            raise
        for adapter in answerer.adapters:
            record = adapter.lease.record
            self.adapter_names.remember(record.id, record.name)
        return answerer


def _encode_by_template(wish: Wish, encoder: PromptEncoder) -> list[list[int]]:
    try:
        return run_within(_TEMPLATE_S, lambda: wish.encode(encoder))
    except TookTooLong as error:
        raise ChatTemplateFailed(
            f"the adapter's chat template was stopped: {error}", param="messages"
        ) from error


def _release(acquiring: asyncio.Future[Answerer]) -> None:
    if not acquiring.cancelled() and acquiring.exception() is None:
        acquiring.result().release()


def new_id(prefix: str) -> str:
    """Return a fresh id such as `cmpl-5f0c...`."""
    return f"{prefix}-{secrets.token_hex(16)}"


def unix_time() -> int:
    """Return the seconds that `created` fields count."""
    return int(time.time())
