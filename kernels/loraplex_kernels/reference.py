"""Every operation in plain torch: the definition that the tests hold all other paths to.

Slow and readable. One adapter, one sequence at a time; float32 inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex_kernels.batch import AttentionBatch, LoRABatch


def read_rows(
    pool_layer: torch.Tensor, pages: torch.Tensor, chunk: int, shape: tuple[int, int], elems: int
) -> torch.Tensor:
    """Gather one LoRA matrix out of its pages.

    Args:
        pool_layer: `[P, page_elems]`.
        pages: int32 `[n]`, the adapter's pages in order.
        chunk: first chunk of the matrix.
        shape: rows and row length of the matrix. Every row begins a chunk.
        elems: elements of a chunk.

    Returns:
        The matrix `[rows, row_length]` in the pool's dtype.
    """
    page_elems = pool_layer.shape[1]
    pitch = -(-shape[1] // elems) * elems
    start = chunk * elems
    stop = start + shape[0] * pitch
    first, last = start // page_elems, -(-stop // page_elems)
    flat = pool_layer[pages[first:last].long()].reshape(-1)
    rows = flat[start - first * page_elems : stop - first * page_elems].view(shape[0], pitch)
    return rows[:, : shape[1]]


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
    """Add LoRA to one site in place: `shrink`, then `expand`.

    `y_t = scale_g * (y_t + w_g B_g (A_g x_t)) + bias_g` for each row `t` of segment `g`, in float32
    and rounded once; scale and bias only where the adapter has them.

    Args:
        y: `[T, sum(out_features)]`, the base outputs of the site; changed in place.
        x: `[T, in]`, the site's input.
        pool_layer: `[P, page_elems]`, this layer of the pool.
        batch: which rows use which adapter.
        layer: index of the layer.
        projections: indices (order q k v o gate up down) of the site's projections.
        out_features: output width of each of them.
    """
    planes = shrink(x, pool_layer, batch, layer=layer, projections=projections)
    expand(
        y,
        planes,
        pool_layer,
        batch,
        layer=layer,
        projections=projections,
        out_features=out_features,
    )


def shrink(
    x: torch.Tensor,
    pool_layer: torch.Tensor,
    batch: LoRABatch,
    *,
    layer: int,
    projections: tuple[int, ...],
) -> torch.Tensor:
    """Return `A_g x_t` of each row `t` of segment `g`, for all modules of a site.

    Arguments as of `add_lora`; where A is cut over devices, of the rows that are here.

    Returns:
        float32 `[E]`, laid out as `lora_planes` says.
    """
    pieces = [torch.zeros(0)]
    indptr, elems = batch.seg_indptr.tolist(), batch.chunk_elems
    for g in range(batch.num_segments):
        rows = x[batch.row_ids[indptr[g] : indptr[g + 1]].long()].float()
        modules = [rows.new_zeros((len(rows), 0))]
        for projection in projections:
            shape = int(batch.own_ranks[layer, g, projection]), x.shape[1]
            at = int(batch.a_chunks[layer, g, projection])
            a = read_rows(pool_layer, batch.page_table[g], at, shape, elems)
            modules.append(rows @ a.float().T)
        pieces.append(torch.cat(modules, dim=1).flatten())
    return torch.cat(pieces)


def expand(
    y: torch.Tensor,
    planes: torch.Tensor,
    pool_layer: torch.Tensor,
    batch: LoRABatch,
    *,
    layer: int,
    projections: tuple[int, ...],
    out_features: tuple[int, ...],
) -> None:
    """Do what `add_lora` does behind `shrink`, whose planes these are: of all rank rows."""
    indptr = batch.seg_indptr.tolist()
    at_plane = 0
    for g in range(batch.num_segments):
        rows = batch.row_ids[indptr[g] : indptr[g + 1]].long()
        weight = 1.0 if batch.weights is None else float(batch.weights[g])
        pages, elems = batch.page_table[g], batch.chunk_elems
        ranks = batch.ranks[layer, g, list(projections)].tolist()
        num_elems = len(rows) * sum(ranks)
        own = planes[at_plane : at_plane + num_elems].view(len(rows), sum(ranks))
        at_plane += num_elems
        column = 0
        for projection, width, shrunk in zip(
            projections, out_features, torch.split(own, ranks, 1), strict=True
        ):
            columns = slice(column, column + width)
            column += width
            total = y[rows, columns].float()
            if rank := shrunk.shape[1]:
                b_at = int(batch.b_chunks[layer, g, projection])
                b = read_rows(pool_layer, pages, b_at, (rank, width), elems).float()
                total += weight * (shrunk @ b)
            if (at := _chunk(batch.scale_chunks, layer, g, projection)) >= 0:
                total *= read_rows(pool_layer, pages, at, (2, width), elems).float().sum(0)
            if (at := _chunk(batch.bias_chunks, layer, g, projection)) >= 0:
                total += read_rows(pool_layer, pages, at, (1, width), elems).float()
            y[rows, columns] = total.to(y.dtype)


def _chunk(table: torch.Tensor | None, layer: int, segment: int, projection: int) -> int:
    return -1 if table is None else int(table[layer, segment, projection])


def write_kv(
    kv: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch
) -> None:
    """Store K and V of this step's tokens into their pages.

    Args:
        kv: `[P, 2, page_tokens, num_kv_heads, head_dim]`, a view of one layer of the pool.
        key: `[T, num_kv_heads, head_dim]`, rotated.
        value: `[T, num_kv_heads, head_dim]`.
        batch: where each token goes.
    """
    kv[batch.slot_pages, 0, batch.slot_offsets] = key.to(kv.dtype)
    kv[batch.slot_pages, 1, batch.slot_offsets] = value.to(kv.dtype)


def paged_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's queries over its own pages, with grouped KV heads.

    `softmax(scale * q k^T) v` over keys `j <= position(q)`, and `j > position(q) - window` where a
    sliding window is given.

    Args:
        query: `[T, num_heads, head_dim]`, rotated.
        kv: `[P, 2, page_tokens, num_kv_heads, head_dim]`, this step's K and V already written.
        batch: queries, contexts and block tables.
        scale: factor on the scores, usually `head_dim ** -0.5`.
        window: tokens a query sees, itself included; None for all.

    Returns:
        `[T, num_heads, head_dim]` in the dtype of `query`.
    """
    out = torch.empty_like(query)
    groups = query.shape[1] // kv.shape[3]
    row = 0
    for s, (num_queries, context) in enumerate(batch.seq_lens):
        pages = batch.block_tables[s, : -(-context // kv.shape[2])].long()
        key, value = (
            kv[pages, i].flatten(0, 1)[:context].float().repeat_interleave(groups, dim=1)
            for i in (0, 1)
        )
        q = query[row : row + num_queries].float()
        scores = torch.einsum("qhd,khd->hqk", q, key) * scale
        position = torch.arange(context - num_queries, context, device=q.device)[:, None]
        index = torch.arange(context, device=q.device)[None, :]
        hidden = index > position
        if window is not None:
            hidden |= index <= position - window
        probs = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        out[row : row + num_queries] = torch.einsum("hqk,khd->qhd", probs, value).to(out.dtype)
        row += num_queries
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: float32, rounded to the dtype of `x`, then weighted.

    Args:
        x: `[T, H]`; or `[T, heads, head_dim]` for the norm of each head.
        weight: broadcast to `x`, of its dtype: `[H]`, or `[T, H]` with one for each row.
        eps: added to the mean square.
    """
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype).mul_(weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of `x + residual`, and that sum; either argument may be overwritten."""
    residual = x.add_(residual)
    return rms_norm(residual, weight, eps), residual


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads by position; elements from `rot_dim` on pass through.

    Args:
        x: `[T, heads, head_dim]`.
        cos: `[T, 1, rot_dim]`.
        sin: `[T, 1, rot_dim]`, the first half negated: element `i` pairs with `i + rot_dim / 2`.

    Returns:
        A new tensor of the shape and dtype of `x`.
    """
    rot_dim = cos.shape[-1]
    if rot_dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(rot_dim // 2, dims=-1), sin)
    turned = rotate(x[..., :rot_dim], cos, sin)
    return torch.cat((turned, x[..., rot_dim:]), dim=-1)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, `[T, I]`, of `[T, 2 I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
