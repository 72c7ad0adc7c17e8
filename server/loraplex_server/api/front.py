"""What all generation endpoints do: find who answers, make jobs, submit them, and answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
import anyio.to_thread
from starlette.requests import HTTPConnection

from loraplex_scheduler.plan import Pooling
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.answer import AnswerFormat, AnswerSource, CompleteFormat, GenerationAnswer
from loraplex_server.api.answer_grammar import GrammarWriter
from loraplex_server.api.errors import TenantForbidden
from loraplex_server.api.exchange import Exchange
from loraplex_server.api.fan_out import FanOut, FanOutFormat
from loraplex_server.api.generations import Generations
from loraplex_server.api.job import Job, Terms
from loraplex_server.api.job_maker import Demands, JobMaker, PromptWish, Wish
from loraplex_server.api.model_names import Answerer, ModelNames, ModelWish
from loraplex_server.api.news import News
from loraplex_server.api.principals import namespace_of, principal_of
from loraplex_server.api.schemas import GenerationBody, RequestBody
from loraplex_server.api.tenant_header import TenantHeader
from loraplex_server.api.timings import Headers
from loraplex_server.api.usage import Usage
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import EngineState
from loraplex_server.tenants.namespace import Namespace
from loraplex_server.text.vocabulary import Vocabulary

__all__ = ["Demands", "Front", "Wish", "new_id", "unix_time"]

#: Requests that wait for the registry or for a file at once; the next ones wait for a place.
_MAX_ACQUIRING: Final = 64


@dataclass(frozen=True)
class Front:
    """Shared by the generation endpoints; immutable.

    Attributes:
        isolates_prefixes: tenants find only what they computed themselves.
        acquiring: threads in which names are resolved that take asking.
    """

    engine: EngineHandle
    vocabulary: Vocabulary
    generations: Generations
    jobs: JobMaker
    adapter_names: AdapterNames
    model_names: ModelNames
    tenant_header: TenantHeader
    isolates_prefixes: bool = False
    grammars: GrammarWriter = field(default_factory=GrammarWriter)
    # Their own: where registry or files hang, those that all share must not hang with them.
    acquiring: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_ACQUIRING)
    )

    async def answer(
        self,
        body: GenerationBody,
        request: HTTPConnection,
        wish: Wish,
        job_id: str,
        make_format: Callable[[Job], AnswerFormat],
        *,
        more_headers: Callable[[Usage], Headers] = lambda usage: [],
    ) -> GenerationAnswer:
        """Submit the request and return its answer to be.

        Args:
            make_format: called for each model that answers.
            more_headers: of a complete answer.

        Raises:
            ModelNotFound, ContextLengthExceeded, QueueFull, ...: see the error table.
        """
        terms = self._terms(body, request)
        wishes = body.model_wishes
        num_sequences = len(wishes) * wish.num_prompts * body.num_samples
        self.generations.check_room(terms.tenant, num_sequences)
        if body.shape is not None:
            wish = replace(wish, grammar=await self.grammars.write(body.shape))
        formats = []

        async def make_job(answerer: Answerer) -> Job:
            job = await self.jobs.generation(body, terms, wish, job_id, answerer)
            # At once, as what the format must know of the conversation is known of this model now.
            formats.append(make_format(job))
            return job

        jobs, source = await self._start(request, wishes, make_job)
        answer_format = formats[0] if body.models is None else FanOutFormat(jobs, formats)
        return GenerationAnswer(
            source,
            answer_format,
            stream_format=answer_format if body.stream else None,
            is_engine_ready=self._is_engine_ready,
            more_headers=more_headers,
        )

    async def embed(
        self,
        body: RequestBody,
        request: HTTPConnection,
        wish: PromptWish,
        kind: Pooling,
        make_format: Callable[[Job], CompleteFormat],
    ) -> GenerationAnswer:
        """Submit prompts to be pooled and return the answer to be; raises as `answer`."""
        terms = self._terms(body, request)
        self.generations.check_room(terms.tenant, wish.num_prompts)
        job_id = new_id("embd")
        [job], source = await self._start(
            request,
            [body.model_wish],
            lambda answerer: self.jobs.pooling(body, terms, wish, job_id, answerer, kind),
        )
        return GenerationAnswer(source, make_format(job), is_engine_ready=self._is_engine_ready)

    async def encode(
        self, model_wish: ModelWish, wish: PromptWish, request: HTTPConnection
    ) -> tuple[list[list[int]], int]:
        """Return prompts of any length as their model would get them, and how many tokens fit it.

        Raises:
            ModelNotFound, ChatTemplateMissing, ...: see the error table.
        """
        answerer = await self._acquire(model_wish, request)
        try:
            prompts = await self.jobs.encode(None, wish, answerer.record)
            return prompts, self.jobs.limit(answerer.record).num_tokens
        finally:
            await _release_all([answerer])

    def _terms(self, body: RequestBody, request: HTTPConnection) -> Terms:
        tenant = self.tenant_header.account_of(request)
        return Terms(
            tenant=tenant,
            priority=_priority(body, request),
            deadline_s=body.deadline_s,
            ttft_slo_s=body.ttft_slo_s,
            exchange=Exchange.of(request.scope),
            prefix_salt=_prefix_salt(tenant if self.isolates_prefixes else "", body.cache_salt),
        )

    def _is_engine_ready(self) -> bool:
        return self.engine.state is EngineState.READY

    async def _start(
        self,
        request: HTTPConnection,
        wishes: Sequence[ModelWish],
        make_job: Callable[[Answerer], Awaitable[Job]],
    ) -> tuple[list[Job], AnswerSource]:
        """Submit one job for each of those who shall answer, all or none."""
        answerers: list[Answerer] = []
        try:
            jobs = []
            for wish in wishes:
                answerers.append(await self._acquire(wish, request))
                jobs.append(await _naming_whose(answerers[-1], make_job, len(wishes)))
            news = News()
            generations = self.generations.start(jobs, news)
        except BaseException:
            await _release_all(answerers)
            raise
        if len(generations) == 1:
            return jobs, generations[0]
        return jobs, FanOut(generations, news, self.generations.clock)

    async def _acquire(self, wish: ModelWish, request: HTTPConnection) -> Answerer:
        """Resolve who answers, once for the whole request."""
        if (base := self.model_names.base(wish)) is not None:
            return base
        namespace = namespace_of(request)
        answerer = self.model_names.try_acquire(wish, namespace)
        if answerer is None:
            answerer = await self._acquire_in_thread(wish, namespace)
        for adapter in answerer.adapters:
            record = adapter.lease.record
            self.adapter_names.remember(record)
        return answerer

    async def _acquire_in_thread(self, wish: ModelWish, namespace: Namespace) -> Answerer:
        acquiring = asyncio.ensure_future(
            anyio.to_thread.run_sync(
                self.model_names.acquire, wish, namespace, limiter=self.acquiring
            )
        )
        try:
            return await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            # The thread goes on and takes the lease; nobody else will give it back.
            acquiring.add_done_callback(_release)
            raise


def _prefix_salt(tenant: str, cache_salt: str | None) -> str:
    """Return what no other pair of a tenant and a salt has; no tenant's name has a line's end."""
    return f"{tenant}\n{cache_salt}" if cache_salt else tenant


def _priority(body: RequestBody, request: HTTPConnection) -> int:
    """Return what the request says; raises TenantForbidden where others would pay for it."""
    priority = body.priority or 0
    if priority < 0 and not principal_of(request).is_admin:
        raise TenantForbidden(
            "a `priority` below 0 goes before all other tenants: only admins may ask for it; leave "
            "it out, or give one above 0 to what can wait"
        )
    return priority


async def _naming_whose(
    answerer: Answerer, make_job: Callable[[Answerer], Awaitable[Job]], num_models: int
) -> Job:
    """Return the job; where several models were asked, an error says whose it is."""
    try:
        return await make_job(answerer)
    except Exception as error:
        if num_models > 1:
            error.args = (f"`{answerer.name}`: {error}", *error.args[1:])
        raise


async def _release_all(answerers: Sequence[Answerer]) -> None:
    """Give all leases back, even if whoever waits for it is cancelled meanwhile."""
    if not any(answerer.adapters for answerer in answerers):
        return
    releasing = asyncio.ensure_future(asyncio.to_thread(_release_each, answerers))
    await asyncio.shield(releasing)


def _release_each(answerers: Sequence[Answerer]) -> None:
    for answerer in answerers:
        answerer.release()


def _release(acquiring: asyncio.Future[Answerer]) -> None:
    if not acquiring.cancelled() and acquiring.exception() is None:
        acquiring.result().release()


def new_id(prefix: str, wanted: str | None = None) -> str:
    """Return the id of an answer, such as `cmpl-5f0c...`, with the client's own word if it has one.

    Nothing relies on its being unique.
    """
    return f"{prefix}-{wanted or secrets.token_hex(16)}"


def unix_time() -> int:
    """Return the seconds that `created` fields count."""
    return int(time.time())
