"""What both generation endpoints do: find the model, encode, submit, and answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.answer import AnswerFormat, GenerationAnswer
from loraplex_server.api.errors import InvalidRequest, ModelNotFound
from loraplex_server.api.generations import Generations
from loraplex_server.api.job import Job, Terms
from loraplex_server.api.prompts import PromptEncoder
from loraplex_server.api.sampling import answer_len, base_sampling, text_options
from loraplex_server.api.schemas import GenerationBody
from loraplex_server.api.tenant_header import TenantHeader
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import EngineState
from loraplex_server.text.vocabulary import Vocabulary

#: Texts longer than this are encoded in a thread: they would hold up every running stream.
_LONG_TEXT_CHARS: Final = 8192


@dataclass(frozen=True)
class Wish:
    """What an endpoint makes of its own fields.

    Attributes:
        num_prompts: what `encode` will return.
        num_chars: text to encode, to decide where.
        encode: returns the prompts' token ids.
        max_tokens: as requested; `default_tokens` if not, and as many as fit if neither is set.
    """

    num_prompts: int
    num_chars: int
    encode: Callable[[PromptEncoder], list[list[int]]]
    max_tokens: int | None
    default_tokens: int | None
    logprobs: int | None


@dataclass(frozen=True)
class Front:
    """Shared by the generation endpoints; immutable."""

    engine: EngineHandle
    catalog: AdapterCatalog
    vocabulary: Vocabulary
    generations: Generations
    adapter_names: AdapterNames
    base_names: tuple[str, ...]
    tenant_header: TenantHeader

    async def answer(
        self,
        body: GenerationBody,
        headers: Headers,
        wish: Wish,
        job_id: str,
        make_format: Callable[[Job], AnswerFormat],
    ) -> GenerationAnswer:
        """Submit the request and return its answer to be.

        Raises:
            ModelNotFound, ContextLengthExceeded, QueueFull, ...: see the error table.
        """
        terms = Terms(
            tenant=self.tenant_header.read(headers),
            priority=body.priority or 0,
            deadline_s=body.deadline_s,
            ttft_slo_s=body.ttft_slo_s,
        )
        self.generations.check_room(terms.tenant, wish.num_prompts * (body.n or 1))
        lease = await self._acquire(body.model)
        try:
            job = await self._job(body, terms, wish, job_id, lease)
            generation = self.generations.start(job)
        except BaseException:
            if lease is not None:
                await asyncio.to_thread(lease.release)
            raise
        return GenerationAnswer(
            generation,
            make_format(job),
            is_stream=bool(body.stream),
            is_engine_ready=lambda: self.engine.state is EngineState.READY,
        )

    async def _job(
        self,
        body: GenerationBody,
        terms: Terms,
        wish: Wish,
        job_id: str,
        lease: AdapterLease | None,
    ) -> Job:
        is_long = wish.num_chars > _LONG_TEXT_CHARS
        encoder = PromptEncoder(self.vocabulary, self.engine.info.max_model_len)
        prompts = await asyncio.to_thread(wish.encode, encoder) if is_long else wish.encode(encoder)
        if not all(prompts):
            raise InvalidRequest("a prompt must have at least one token", param="prompt")
        max_tokens = answer_len(
            requested=wish.max_tokens,
            default=wish.default_tokens,
            longest_prompt=max(len(prompt) for prompt in prompts),
            max_model_len=self.engine.info.max_model_len,
        )
        sampling = base_sampling(
            body, self.vocabulary, max_tokens=max_tokens, logprobs=wish.logprobs
        )
        return Job(
            job_id=job_id,
            prompts=tuple(map(tuple, prompts)),
            n=body.n or 1,
            sampling=sampling,
            text=text_options(body),
            lease=lease,
            terms=terms,
        )

    async def _acquire(self, name: str) -> AdapterLease | None:
        """Resolve a name, once for the whole request; None is the base model."""
        if name in self.base_names:
            return None
        acquiring = asyncio.ensure_future(asyncio.to_thread(self.catalog.acquire, name))
        try:
            lease = await asyncio.shield(acquiring)
        except AdapterNotFound:
            raise ModelNotFound(name) from None
        except asyncio.CancelledError:
            # The thread goes on and takes the lease; nobody else will give it back.
            acquiring.add_done_callback(_release)
            raise
        self.adapter_names.remember(lease.record.id, name)
        return lease


def _release(acquiring: asyncio.Future[AdapterLease]) -> None:
    if not acquiring.cancelled() and acquiring.exception() is None:
        acquiring.result().release()


def new_id(prefix: str) -> str:
    """Return a fresh id such as `cmpl-5f0c...`."""
    return f"{prefix}-{secrets.token_hex(16)}"


def unix_time() -> int:
    """Return the seconds that `created` fields count."""
    return int(time.time())
