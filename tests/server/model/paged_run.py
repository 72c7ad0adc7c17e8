"""Running a transformer over sequences in shuffled pages, as the engine's runner does."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from loraplex_kernels.batch import (
    LoRABatch,
    PagedAdapter,
    build_attention_batch,
    build_lora_batch,
)
from loraplex_kernels.ops import KernelBackend, host_backend
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PoolLayout
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool
from loraplex_server.model.transformer import Transformer


class PagedRun:
    """A pool, the sequences in it and its adapters; every page is handed out once, at random."""

    def __init__(
        self,
        model: Transformer,
        *,
        num_pages: int = 64,
        page_tokens: int = 4,
        seed: int = 0,
        backend: Callable[[PagePool], KernelBackend] = lambda pool: host_backend(),
    ) -> None:
        self.model = model
        self.layout = PoolLayout(model.spec.geometry, page_tokens)
        self.pool = PagePool(self.layout, num_pages, dtype=model.dtype, device=model.device)
        self._backend = backend(self.pool)
        self.lengths: dict[str, int] = {}
        self._tables: dict[str, list[int]] = {}
        self._adapters: dict[str, PagedAdapter] = {}
        self._free = list(range(num_pages))
        random.Random(seed).shuffle(self._free)

    def load_adapter(self, name, weights, ranks) -> None:
        """Pack an adapter and put it into pages of the pool."""
        layout = AdapterLayout(self.layout, AdapterSpec(ranks))
        pages = [self._free.pop() for _ in range(layout.num_pages)]
        self.pool.write(pages, pack_adapter(AdapterWeights(weights), layout, dtype=self.pool.dtype))
        self._adapters[name] = PagedAdapter(pages, ranks, layout.a_chunks, layout.b_chunks)

    def step(
        self,
        new_tokens: Mapping[str, Sequence[int]],
        adapters: Mapping[str, str | None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the next tokens of several sequences at once.

        Returns:
            Logits `[new tokens, vocab]` of each sequence.
        """
        names = sorted(new_tokens, key=lambda name: len(new_tokens[name]) > 1)
        spans = [(self.lengths.get(name, 0), len(new_tokens[name])) for name in names]
        for name, (start, count) in zip(names, spans, strict=True):
            table = self._tables.setdefault(name, [])
            while len(table) < self.layout.pages_for_tokens(start + count):
                table.append(self._free.pop())
            self.lengths[name] = start + count
        batch = build_attention_batch(
            spans, [self._tables[name] for name in names], self.layout.page_tokens
        )
        ids = [t for name in names for t in new_tokens[name]]
        tokens = torch.tensor(ids, device=self.model.device)
        ops = self._backend.prepare(batch, self._lora_batch(names, new_tokens, adapters or {}))
        logits = self.model.forward(tokens, ops, self.pool)
        return dict(zip(names, logits.split([count for _, count in spans]), strict=True))

    def _lora_batch(self, names, new_tokens, adapters) -> LoRABatch | None:
        rows: dict[str, list[int]] = {}
        at = 0
        for name in names:
            adapter = adapters.get(name)
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(at, at + len(new_tokens[name])))
            at += len(new_tokens[name])
        paged = [self._adapters[adapter] for adapter in rows]
        return build_lora_batch(paged, list(rows.values()), self.layout.chunk_elems)
