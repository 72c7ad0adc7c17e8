"""The engine without a server: prompts in, completions out, in this process.

with Engine() as engine:
    engine.add_adapter("pirate", "clients/examples/pirate")
    for answer in engine.generate(["Hello!"] * 2, adapters=[None, "pirate"]):
        print(answer.text)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import (
    Event,
    FinishReason,
    Pooling,
    Request,
    SampledToken,
    TokenLogprobs,
)
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.registration import Registration
from loraplex_server.build import build_core, resolve_facts
from loraplex_server.config import Config
from loraplex_server.engine.adapted_prompt import adapt_prompt
from loraplex_server.engine.messages import EngineStats
from loraplex_server.text.assembler import TextAssembler, TextOptions
from loraplex_server.text.vocabulary import Message, Vocabulary

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        message: why, when `finish_reason` is a failure.
        prompt_logprobs: of the prompt's tokens from the second one on, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason
    message: str = ""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Engine:
    """Used from one thread. Adapters live as long as the engine; nothing outlives it on disk."""

    def __init__(self, config: Config | None = None) -> None:
        """Load the model of `config` (default: the embedded model, all settings at default).

        With `tensor_parallel`, other ranks are processes that import the program's main module
        again, which must do nothing then.

        Raises:
            ModelError, EngineConfigError: as their messages say.
        """
        config = config or Config()
        facts = resolve_facts(config)
        self.vocabulary = Vocabulary(facts.source.load_tokenizer(), size=facts.spec.vocab_size)
        self._core = build_core(config, facts)
        if (tokenizer := self.vocabulary.to_json()) is not None:
            self._core.learn_tokens(tokenizer)
        self._cleanup = ExitStack()
        self._cleanup.callback(self._core.close)
        folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-"))
        self._catalog = AdapterCatalog(
            data_dir=Path(folder),
            pool_layout=facts.layout,
            base_name=facts.base_name,
            reader=FolderReader(BaseModel.open(facts.source, facts.spec), (facts.base_name,)),
        )
        self._cleanup.callback(self._catalog.close)
        self._manifests: dict[str, AdapterManifest] = {}
        self._num_requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the loader's thread and remove the adapters' files. Idempotent."""
        self._cleanup.close()

    def stats(self) -> EngineStats:
        """Return what the pool holds and what has been counted so far."""
        return self._core.stats()

    def add_adapter(
        self, name: str, folder: str | Path, *, check_base: bool = True
    ) -> AdapterRecord:
        """Validate a PEFT folder and make it available as `name`.

        Raises:
            AdapterError: it is refused, with every reason.
        """
        wish = Registration(name, check_base=check_base)
        record, _ = self._catalog.register(wish, Path(folder))
        lease = self._catalog.acquire(name)
        self._cleanup.callback(lease.release)
        self._manifests[name] = lease.manifest
        return record

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapters: Sequence[str | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        text: TextOptions | None = None,
    ) -> list[Completion]:
        """Generate for all prompts together, in one mixed batch.

        Args:
            prompts: texts or token ids.
            adapters: one name (or None for the base) per prompt; default: the base for all.
            sampling: for all, or one per prompt; default: greedy, 128 tokens. Equal
                prompts with equal seeds get equal answers, whatever runs beside them.
            text: stop strings and how tokens are written down.

        Raises:
            UnknownToken: a prompt, a bias or a stop token is not in the vocabulary.
            RankLost: another rank has ended or hangs; this engine is good for nothing more.
        """
        adapters = adapters or [None] * len(prompts)
        if sampling is None or isinstance(sampling, SamplingParams):
            default = SamplingParams(max_tokens=128, temperature=0.0)
            sampling = [sampling or default] * len(prompts)
        pending = [
            _Pending(self._request(prompt, adapter, params), self.vocabulary, text)
            for prompt, adapter, params in zip(prompts, adapters, sampling, strict=True)
        ]
        self._drive({p.request.request_id: p for p in pending})
        return [p.completion() for p in pending]

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        adapters: Sequence[str | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        text: TextOptions | None = None,
    ) -> list[Completion]:
        """Answer conversations written with the model's chat template; see `generate`."""
        prompts = [
            self.vocabulary.encode(self.vocabulary.render_chat(c), add_special_tokens=False)
            for c in conversations
        ]
        return self.generate(prompts, adapters=adapters, sampling=sampling, text=text)

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        adapters: Sequence[str | None] | None = None,
        pooling: Pooling = Pooling.LAST,
    ) -> list[tuple[float, ...]]:
        """Return the final hidden states of prompts, not normalised, one vector for each.

        Args:
            prompts, adapters: as of `generate`.
            pooling: of the last token, or the mean over all.

        Raises:
            UnknownToken: a token id is not in the vocabulary.
            RequestRefused: a prompt is empty or too long, or failed; it says which and why.
        """
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        pending = [
            _Pending(self._request(prompt, adapter, sampling, pooling), self.vocabulary, None)
            for prompt, adapter in zip(prompts, adapters or [None] * len(prompts), strict=True)
        ]
        self._drive({p.request.request_id: p for p in pending})
        return [p.embedding(f"prompt {index}") for index, p in enumerate(pending)]

    def _request(
        self,
        prompt: Prompt,
        adapter: str | None,
        sampling: SamplingParams,
        pooling: Pooling | None = None,
    ) -> Request:
        ids = self.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
        # An id without a row in the embedding would end the step of everyone.
        self.vocabulary.check(ids, param="prompts")
        self.vocabulary.check(list(sampling.logit_bias), param="logit_bias")
        self.vocabulary.check(list(sampling.stop_token_ids), param="stop_token_ids")
        allowed = list(sampling.allowed_token_ids or ())
        self.vocabulary.check(allowed, param="allowed_token_ids")
        self.vocabulary.check([i for word in sampling.bad_words for i in word], param="bad_words")
        self._num_requests += 1
        manifest = self._manifests[adapter] if adapter is not None else None
        adapted = adapt_prompt(manifest, ids, len(self.vocabulary))
        return Request(
            request_id=f"offline-{self._num_requests}",
            prompt_token_ids=adapted.token_ids,
            sampling=sampling,
            adapter=adapted.adapter,
            arrival_s=time.monotonic(),
            adapter_start=adapted.adapter_start,
            num_virtual=adapted.num_virtual,
            pooling=pooling,
        )

    def _drive(self, pending: dict[str, _Pending]) -> None:
        """Run until all are finished; whatever ends this early, nothing of them goes on."""
        try:
            events = [event for p in pending.values() for event in self._core.add(p.request)]
            self._push(events, pending)
            while pending:
                self._push(self._core.step(load_timeout_s=1.0), pending)
        finally:
            for request_id in pending:
                self._core.abort(request_id)

    def _push(self, events: Sequence[Event], pending: dict[str, _Pending]) -> None:
        for event in events:
            if (target := pending.get(event.request_id)) is not None:
                target.push(event)
                # A stop string ends the text here, before the engine has ended the request.
                if target.is_finished:
                    self._core.abort(event.request_id)
                    del pending[event.request_id]


class _Pending:
    """One prompt on its way."""

    def __init__(
        self, request: Request, vocabulary: Vocabulary, options: TextOptions | None
    ) -> None:
        self.request = request
        self._assembler = TextAssembler(
            vocabulary,
            options or TextOptions(),
            prompt_ids=request.prompt_token_ids[request.num_virtual :],
            stop_token_ids=request.sampling.stop_token_ids,
        )
        self._text: list[str] = []
        self._tokens: list[SampledToken] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._embedding: tuple[float, ...] | None = None
        self._finish_reason = FinishReason.FAILED
        self._message = ""

    @property
    def is_finished(self) -> bool:
        return self._assembler.is_finished

    def push(self, event: Event) -> None:
        delta = self._assembler.push([event])
        self._text.append(delta.text)
        self._tokens += delta.tokens
        self._prompt_logprobs += delta.prompt_logprobs
        self._embedding = delta.embedding
        if delta.finish_reason is not None:
            self._finish_reason, self._message = delta.finish_reason, delta.message

    def embedding(self, name: str) -> tuple[float, ...]:
        """Return it, or raise RequestRefused about what is called `name`."""
        if self._embedding is None:
            raise RequestRefused(reason=f"{name}: {self._message}")
        return self._embedding

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._text),
            token_ids=tuple(token.token_id for token in self._tokens),
            tokens=tuple(self._tokens),
            finish_reason=self._finish_reason,
            message=self._message,
            prompt_logprobs=tuple(self._prompt_logprobs),
        )
