"""A device that knows no model but every page: it checks that plans make sense where they run.

Launches take effect in their order, as on one stream. Each step is checked against what the pages
hold at that moment: KV of these very tokens, all of the adapter. So a page that changes hands too
early, a stale token or a wrong position shows at once.

A request's seed must be its own: it alone decides the answer (`answer_of`).
"""

from __future__ import annotations

import zlib
from collections.abc import Set as AbstractSet

from loraplex_scheduler.plan import (
    AdapterLoad,
    FinishReason,
    Plan,
    Request,
    SampledToken,
    SequenceStep,
    StepResult,
)
from tests.support.scheduling import EOS

#: Drawn in place of a banned token, and as the input after a draw that failed.
_INSTEAD = 99

#: Why a request fails whose logits are not finite.
NOT_FINITE = "not finite"

#: Content of a page: the adapter, or for each of its tokens what its KV depends on.
_Content = tuple[tuple[tuple[str, float], ...], int, int]
_Page = str | list[_Content | None]


def draw(seed: int, position: int, banned: AbstractSet[int]) -> int | None:
    """Return the token of a request at a position; None when its logits are not finite."""
    token = zlib.crc32(f"{seed}:{position}".encode()) % 40
    if token == 39:
        return None
    return _INSTEAD if token in banned else token


def answer_of(request: Request, max_len: int) -> tuple[list[int], FinishReason]:
    """Return what a request must get when nothing ends it early."""
    sampling, tokens = request.sampling, list[int]()
    ends = sampling.stop_token_ids | (set() if sampling.ignore_eos else {EOS})
    while True:
        num_tokens = len(request.prompt_token_ids) + len(tokens)
        banned = ends if len(tokens) < sampling.min_tokens else frozenset[int]()
        token = draw(sampling.seed, num_tokens, banned)
        if token is None:
            return tokens, FinishReason.FAILED
        tokens.append(token)
        if token in ends:
            return tokens, FinishReason.STOP
        if len(tokens) == sampling.max_tokens or num_tokens + 1 == max_len:
            return tokens, FinishReason.LENGTH


class ShadowDevice:
    """Remembers who wrote which page, and every token it drew."""

    def __init__(self, page_tokens: int = 4) -> None:
        self._page_tokens = page_tokens
        self._pages: dict[int, _Page] = {}
        self._drawn: dict[tuple[int, int], int] = {}
        self._last: dict[str, int] = {}

    def begin_load(self, load: AdapterLoad) -> None:
        self._pages |= dict.fromkeys(load.pages, "half an adapter")

    def end_load(self, load: AdapterLoad) -> None:
        self._pages |= dict.fromkeys(load.pages, load.adapter.adapter_id)

    def launch(self, plan: Plan) -> StepResult:
        """Check and compute a plan."""
        assert len({step.request_id for step in plan.sequences}) == len(plan.sequences)
        is_long = [step.num_tokens > 1 for step in plan.sequences]
        assert is_long == sorted(is_long), "single tokens come first"
        for step in plan.sequences:
            self._write(step)
        for step in plan.sequences:
            self._check(step, plan)
        tokens, failures = {}, {}
        self._last = {}
        for step in plan.sequences:
            if not step.is_sampled:
                continue
            key = step.sampling.seed, step.position
            assert key not in self._drawn, "a token was sampled twice"
            token = draw(*key, step.banned_token_ids)
            self._drawn[key] = self._last[step.request_id] = _INSTEAD if token is None else token
            if token is None:
                failures[step.request_id] = NOT_FINITE
            else:
                tokens[step.request_id] = SampledToken(token)
        return StepResult(tokens, failures)

    def _write(self, step: SequenceStep) -> None:
        token_ids = list(step.token_ids)
        if step.awaits_token:
            token_ids.append(self._last[step.request_id])
        assert len(token_ids) == step.num_tokens > 0
        for position, token_id in enumerate(token_ids, step.start):
            assert token_id == self._token(step, position), "a wrong token at this position"
            page_id = step.block_table[position // self._page_tokens]
            page = self._pages.get(page_id)
            if not isinstance(page, list):
                page = self._pages[page_id] = [None] * self._page_tokens
            page[position % self._page_tokens] = self._content(step, position)

    def _check(self, step: SequenceStep, plan: Plan) -> None:
        num_tokens = step.start + step.num_tokens
        for position in range(num_tokens):
            page = self._pages[step.block_table[position // self._page_tokens]]
            found = page[position % self._page_tokens]
            assert found == self._content(step, position), "not the KV of this text"
        for manifest, _ in step.request.adapters:
            adapter_id = manifest.adapter_id
            for page_id in plan.adapters[adapter_id].pages:
                assert self._pages[page_id] == adapter_id, "these pages hold something else"
        if step.is_sampled:
            assert step.position == num_tokens
        if step.is_sampled and step.sampling.needs_history:
            text = range(step.request.num_virtual, num_tokens)
            assert step.history == tuple(self._token(step, p) for p in text)

    def _content(self, step: SequenceStep, position: int) -> _Content:
        """Return what keys and values depend on: the adapters, their weights and where they begin
        to matter, unless that is behind this token; and all tokens up to this one.
        """
        chain = tuple(self._token(step, p) for p in range(position + 1))
        start = step.request.adapter_start
        weighted = tuple((m.adapter_id, weight) for m, weight in step.request.adapters)
        return ((), 0, hash(chain)) if position < start else (weighted, start, hash(chain))

    def _token(self, step: SequenceStep, position: int) -> int:
        if position < step.num_prompt:
            return position + 1  # as `make_request` counts
        return self._drawn[step.sampling.seed, position]
