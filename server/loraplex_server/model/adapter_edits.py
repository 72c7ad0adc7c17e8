"""What adapters change beside the outputs of linears, for their own rows of one step.

`AdapterEdits` is made for a step in which some adapter has such parts (`AdapterLayout.needs_edits`)
and rows that they concern; the transformer calls it between its own operations. These are plain
torch operations on parts gathered from the pool: they wait for no device, and a row's result
depends on that row alone. What each part does is written at its name in `adapter_spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
import torch

from loraplex_kernels.batch import AttentionBatch
from loraplex_kernels.model_tables import HeadNorms
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import (
    EMBEDDING,
    EMBEDDING_A,
    EMBEDDING_B,
    FINAL_NORM,
    HEAD,
    HEAD_A,
    HEAD_B,
    HEAD_ROWS,
    K_NORM,
    KV_PREFIX,
    Q_NORM,
    SOFT_PROMPT,
    TOKEN_ROWS,
    bias,
    in_scale,
    out_scale,
)
from loraplex_memory.layout import SITES, Projection, Site
from loraplex_memory.pool import PagePool
from loraplex_server.model.device_copy import copy_to
from loraplex_server.model.linear import Linear
from loraplex_server.model.paged_parts import PagedParts


@dataclass(frozen=True)
class EditedRows:
    """Which rows of a step one adapter edits; data only, on the host.

    Attributes:
        pages: the adapter's pages.
        rows: token rows that have the adapter.
        logit_rows: those rows of the logits that have it.
        virtual_rows: token rows of virtual tokens.
        virtual_idxs: which virtual token each of them is.
    """

    layout: AdapterLayout
    pages: Sequence[int]
    rows: Sequence[int]
    logit_rows: Sequence[int]
    virtual_rows: Sequence[int] = ()
    virtual_idxs: Sequence[int] = ()


class AdapterEdits:
    """Owned by the runner, for one step."""

    def __init__(
        self, edited: Sequence[EditedRows], attention: AttentionBatch, pool: PagePool
    ) -> None:
        """Bring the step's tables to the pool's device.

        Args:
            edited: one per adapter that edits something, at least one; no row twice.
            attention: where the step's tokens go, in host memory.
            pool: where the adapters are.
        """
        self._num_rows = len(attention.positions)
        slots = attention.slot_pages.numpy(), attention.slot_offsets.numpy()
        tables: list[Sequence[int]] = []
        for one in edited:
            of_virtual = [table[list(one.virtual_rows)].tolist() for table in slots]
            tables += [one.pages, one.rows, one.logit_rows, one.virtual_rows, one.virtual_idxs]
            tables += [*of_virtual, one.layout.spec.token_ids, one.layout.spec.head_token_ids]
        on_device = _upload(tables, pool.device)
        count = len(tables) // len(edited)
        self._edits = [
            _AdapterEdit(one.layout, pool, *on_device[i * count : (i + 1) * count])
            for i, one in enumerate(edited)
        ]

    def embed(
        self,
        token_ids: torch.Tensor,
        look_up: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
    ) -> torch.Tensor:
        """Return the embeddings `[T, H]` of integer `token_ids` `[T]`, virtual tokens among them.

        Args:
            look_up: returns those of the base.
            vocab_size: how many there are.
        """
        token_ids = token_ids.clamp(max=vocab_size - 1)
        x = look_up(token_ids)
        for edit in self._edits:
            edit.embed(x, token_ids)
        return x

    def norm(self, name: str, layer: int, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights of a layer's norm, `[T, H]`; `weight` `[H]` if nobody has others."""
        parts = [(edit.rows, edit.parts.of_layer(name, layer)) for edit in self._edits]
        return _with_rows(weight, self._num_rows, parts)

    def head_norms(self, norms: HeadNorms, layer: int) -> HeadNorms:
        """Return the weights of the norms of a layer's query and key heads."""
        q, k = self.norm(Q_NORM, layer, norms.q), self.norm(K_NORM, layer, norms.k)
        if q.dim() == k.dim():
            return HeadNorms(q, k)
        shape = self._num_rows, q.shape[-1]
        return HeadNorms(q.expand(shape).contiguous(), k.expand(shape).contiguous())

    def final_norm(self, weight: torch.Tensor, num_logits: int) -> torch.Tensor:
        """Return the weights of the last norm, `[N, H]` of as many rows as there are logits."""
        parts = [(edit.logit_rows, edit.parts.of_model(FINAL_NORM)) for edit in self._edits]
        return _with_rows(weight, num_logits, parts)

    def scale_input(self, x: torch.Tensor, layer: int, site: Site) -> None:
        """Scale the input `x` `[T, in]` of a site in place."""
        for edit in self._edits:
            scale = edit.parts.of_layer(in_scale(site), layer)
            if scale is not None:
                x.index_copy_(0, edit.rows, x[edit.rows] * scale)

    def finish_output(self, y: torch.Tensor, layer: int, site: Site) -> None:
        """Scale and shift the output `y` `[T, H]` of a row-parallel site in place.

        Where several devices add such an output up, its scale and bias cannot come before.
        """
        (projection,) = SITES[site]
        for edit in self._edits:
            edit.finish_output(y, layer, projection)

    def write_prefix(self, kv: torch.Tensor, layer: int) -> None:
        """Put stored keys and values where those of virtual tokens have been written.

        Args:
            kv: `[P, 2, page_tokens, num_kv_heads, head_dim]`, one layer of the pool.
        """
        for edit in self._edits:
            edit.write_prefix(kv, layer)

    def head(self, logits: torch.Tensor, x: torch.Tensor, first: int | None = None) -> None:
        """Change the logits in place.

        Args:
            logits: float32 `[N, V]`, the base's.
            x: `[N, H]`, what the head multiplied.
            first: these are not all the rows, but those from this one on.
        """
        for edit in self._edits:
            rows = edit.logit_rows
            if first is not None:
                rows = rows[(rows >= first) & (rows < first + len(logits))] - first
            edit.head(logits, x, rows)


class _AdapterEdit:
    """One adapter's; index tensors are int64, on the device."""

    def __init__(
        self,
        layout: AdapterLayout,
        pool: PagePool,
        pages: torch.Tensor,
        rows: torch.Tensor,
        logit_rows: torch.Tensor,
        virtual_rows: torch.Tensor,
        virtual_idxs: torch.Tensor,
        slot_pages: torch.Tensor,
        slot_offsets: torch.Tensor,
        token_ids: torch.Tensor,
        head_token_ids: torch.Tensor,
    ) -> None:
        self.parts = PagedParts(pool, layout, pages)
        self.rows = rows
        self.logit_rows = logit_rows
        self._virtual_rows = virtual_rows
        self._virtual_idxs = virtual_idxs
        self._slots = slot_pages, slot_offsets
        self._token_ids = token_ids
        self._head_token_ids = head_token_ids

    def embed(self, x: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Change the embeddings `x` `[T, H]` of `token_ids` `[T]` in place."""
        parts, ids = self.parts, token_ids[self.rows]
        if (part := parts.part(EMBEDDING)) is not None:
            x.index_copy_(0, self.rows, parts.lookup(part, ids))
        b = parts.of_model(EMBEDDING_B)
        if b is not None and (part := parts.part(EMBEDDING_A)) is not None:
            delta = _multiply(parts.lookup(part, ids).float(), b.float().T)
            x.index_copy_(0, self.rows, (x[self.rows].float() + delta).to(x.dtype))
        if (part := parts.part(TOKEN_ROWS)) is not None:
            at = torch.searchsorted(self._token_ids, ids).clamp(max=part.num_rows - 1)
            is_edited = (self._token_ids[at] == ids)[:, None]
            x.index_copy_(
                0, self.rows, torch.where(is_edited, parts.lookup(part, at), x[self.rows])
            )
        self._embed_virtual(x)

    def _embed_virtual(self, x: torch.Tensor) -> None:
        if not len(self._virtual_rows):
            return
        part = self.parts.part(SOFT_PROMPT)
        if part is None:
            # Nobody reads what becomes of them: their keys and values are overwritten. Zeros stay
            # finite through every layer.
            x.index_fill_(0, self._virtual_rows, 0.0)
        else:
            x.index_copy_(0, self._virtual_rows, self.parts.lookup(part, self._virtual_idxs))

    def finish_output(self, y: torch.Tensor, layer: int, projection: Projection) -> None:
        """See `AdapterEdits.finish_output`."""
        scale = self.parts.of_layer(out_scale(projection), layer)
        shift = self.parts.of_layer(bias(projection), layer)
        if scale is None and shift is None:
            return
        own = y[self.rows].float()
        if scale is not None:
            own *= scale.float().sum(0)
        if shift is not None:
            own += shift.float()
        y.index_copy_(0, self.rows, own.to(y.dtype))

    def write_prefix(self, kv: torch.Tensor, layer: int) -> None:
        """See `AdapterEdits.write_prefix`."""
        if not len(self._virtual_rows):
            return
        prefix = self.parts.of_layer(KV_PREFIX, layer)
        if prefix is not None:
            pages, offsets = self._slots
            kv[pages, :, offsets] = prefix[self._virtual_idxs].view(-1, 2, *kv.shape[3:])

    def head(self, logits: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Change these rows of the logits, see `AdapterEdits.head`."""
        parts = self.parts
        if not len(rows):
            return
        own = x[rows]
        if (part := parts.part(HEAD)) is not None:
            for first, block in parts.blocks(part):
                columns = logits[:, first : first + len(block)]
                columns.index_copy_(0, rows, _multiply(own, block).float())
        a, b = parts.of_model(HEAD_A), parts.of_model(HEAD_B)
        if a is not None and b is not None:
            logits.index_add_(0, rows, _multiply(_multiply(own.float(), a.float()), b.float().T))
        if (weight := parts.of_model(HEAD_ROWS)) is not None:
            logits[rows[:, None], self._head_token_ids] = _multiply(own, weight).float()


def _with_rows(
    weight: torch.Tensor,
    num_rows: int,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> torch.Tensor:
    """Return `weight` `[H]`, or if any part is there, `[num_rows, H]` with these rows replaced."""
    if all(part is None for _, part in parts):
        return weight
    weights = weight.repeat(num_rows, 1)
    for rows, part in parts:
        if part is not None:
            weights.index_copy_(0, rows, part.expand(len(rows), -1))
    return weights


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x W^T`; on a CPU a row's result is the same to the last bit in any company."""
    linear = Linear(weight.contiguous())
    linear.pack()
    return linear(x)


def _upload(tables: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Copy tables to `device` as int64 in one transfer."""
    ends = list(accumulate(len(table) for table in tables))
    flat = np.fromiter(chain.from_iterable(tables), dtype=np.int64, count=ends[-1])
    on_device = copy_to(device, torch.from_numpy(flat))
    return [on_device[start:end] for start, end in pairwise([0, *ends])]
