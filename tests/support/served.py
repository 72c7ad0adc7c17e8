"""Logits as the engine computes them: adapters packed into one pool, one mixed forward pass."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraplex_kernels.ops import host_backend
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool
from loraplex_scheduler.plan import Plan, PlannedAdapter, Request, SequenceStep
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.adapted_prompt import adapt_prompt
from loraplex_server.engine.forward_batch import BatchBuilder
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.transformer import Transformer
from tests.support.tiny_models import transformer_of

#: The name of an adapter (None for the base) and a prompt.
Prompt = tuple[str | None, Sequence[int]]


def served_logits(
    reference: Any, adapters: Mapping[str, AdapterWeights], prompts: Sequence[Prompt]
) -> list[torch.Tensor]:
    """Compute whole prompts of the base and of adapters in one batch.

    Args:
        reference: the transformers model whose parameters we serve.
        adapters: as readers return them, by name.
        prompts: whose prompt, and its token ids without virtual tokens.

    Returns:
        float32 `[tokens, V]` for each prompt, without the rows of virtual tokens.
    """
    return ServedModel(transformer_of(reference), adapters).logits(prompts)


class ServedModel:
    """A pool with adapters at scattered pages; what nobody has written to it is NaN."""

    def __init__(
        self, model: Transformer, adapters: Mapping[str, AdapterWeights], *, num_kv_pages: int = 512
    ) -> None:
        self.model = model
        self.layout = PoolLayout(model.spec.geometry, page_tokens=4)
        num_layers = model.spec.geometry.num_layers
        self.manifests = {
            name: AdapterManifest(name, "/nowhere", weights.spec(num_layers))
            for name, weights in adapters.items()
        }
        layouts = {n: AdapterLayout(self.layout, m.spec) for n, m in self.manifests.items()}
        num_pages = sum(layout.num_pages for layout in layouts.values()) + num_kv_pages
        self.pool = PagePool(self.layout, num_pages, dtype=model.dtype, device=model.device)
        self.pool.data.fill_(torch.nan)
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)
        self.adapters: dict[str, PlannedAdapter] = {}
        for name, layout in layouts.items():
            pages = self._take(layout.num_pages)
            self.pool.write(pages, pack_adapter(adapters[name], layout, dtype=model.dtype))
            self.adapters[name] = PlannedAdapter(layout, pages)

    def logits(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """See `served_logits`."""
        return self.logits_of([self._request(f"r{i}", *p) for i, p in enumerate(prompts)])

    def logits_of(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        """Compute the prompts of requests; their adapters are known by the names given here."""
        steps = [self._step(request) for request in requests]
        # Spans of one token come first in a plan.
        order = sorted(range(len(steps)), key=lambda i: steps[i].num_tokens > 1)
        plan = self.plan([steps[i] for i in order])
        counts = [step.num_tokens for step in plan.sequences]
        rows = dict(zip(order, self.forward(plan).split(counts), strict=True))
        return [rows[i][step.request.num_virtual :] for i, step in enumerate(steps)]

    def plan(self, steps: Sequence[SequenceStep]) -> Plan:
        """Return a plan of these steps."""
        used = {m.adapter_id for step in steps for m, _ in step.request.adapters}
        return Plan(tuple(steps), (), {name: self.adapters[name] for name in sorted(used)})

    def forward(self, plan: Plan) -> torch.Tensor:
        """Return the logits of every token row of a plan, float32 `[T, V]`."""
        batches = BatchBuilder(self.layout)
        attention = batches.attention(plan)
        token_ids = torch.tensor([t for step in plan.sequences for t in step.token_ids])
        lora, more_lora = batches.lora(plan), batches.more_lora(plan)
        ops = host_backend().prepare(attention, lora, more_lora)
        edited = batches.edits(plan, range(len(token_ids)))
        edits = AdapterEdits(edited, attention, self.pool) if edited else None
        return self.model.forward(token_ids, ops, self.pool, edits=edits)

    def _request(self, request_id: str, adapter: str | None, prompt: Sequence[int]) -> Request:
        manifest = self.manifests[adapter] if adapter is not None else None
        adapted = adapt_prompt(manifest, prompt, self.model.spec.vocab_size)
        return Request(
            request_id,
            adapted.token_ids,
            SamplingParams(max_tokens=1),
            adapted.adapter,
            num_virtual=adapted.num_virtual,
            adapter_start=adapted.adapter_start,
        )

    def _step(self, request: Request) -> SequenceStep:
        token_ids = request.prompt_token_ids
        pages = self._take(self.layout.pages_for_tokens(len(token_ids)))
        return SequenceStep(request, 0, len(token_ids), token_ids, pages, is_sampled=True)

    def _take(self, num_pages: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(num_pages))
