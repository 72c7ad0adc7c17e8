"""The CPU path: compiled kernels where there is a compiler, torch's own operations elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex_kernels import reference
from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.native import MAX_GROUPS, load_native


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool_layer: torch.Tensor,
    batch: LoRABatch,
    *,
    layer: int,
    projections: tuple[int, ...],
    out_features: tuple[int, ...],
) -> None:
    """See `reference.add_lora`."""
    native = load_native()
    x = x.contiguous()
    implementation = (
        native.add_lora
        if native is not None and native.takes(y, x, pool_layer)
        else reference.add_lora
    )
    implementation(
        y, x, pool_layer, batch, layer=layer, projections=projections, out_features=out_features
    )


def paged_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """See `reference.paged_attention`."""
    query = query.contiguous()
    native = load_native()
    groups = query.shape[1] // kv.shape[3]
    if native is not None and native.takes(query, kv) and groups <= MAX_GROUPS:
        return native.paged_attention(query, kv, batch, scale=scale, window=window)
    out = torch.empty_like(query)
    row = 0
    for s, (num_queries, context) in enumerate(batch.seq_lens):
        rows = slice(row, row + num_queries)
        pages = batch.block_tables[s, : -(-context // kv.shape[2])]
        _attend_span(out[rows], query[rows], kv[pages.long()], context, scale, window)
        row += num_queries
    return out


def _attend_span(
    out: torch.Tensor,
    query: torch.Tensor,
    pages: torch.Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> None:
    """Attend for one sequence: `query` `[n, heads, d]` are its last tokens, `pages` its KV."""
    num_queries = query.shape[0]
    key, value = (pages[:, i].flatten(0, 1)[:context].transpose(0, 1) for i in (0, 1))
    # A whole prompt needs no mask tensor: torch's flash kernel knows plain causality.
    is_plain = num_queries == context and (window is None or window >= context)
    mask = None if is_plain else _mask(num_queries, context, window, query.device)
    result = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=is_plain,
        scale=scale,
        enable_gqa=True,
    )
    out.copy_(result[0].transpose(0, 1))


def _mask(num_queries: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool `[num_queries, context]`, True where a query may look."""
    position = torch.arange(context - num_queries, context, device=device)[:, None]
    index = torch.arange(context, device=device)[None, :]
    visible = index <= position
    if window is not None:
        visible &= index > position - window
    return visible
