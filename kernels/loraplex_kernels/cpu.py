"""The CPU path: compiled kernels where there is a compiler, torch's own operations elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from loraplex_kernels import reference
from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.lora_planes import PlaneLayout, gather_order
from loraplex_kernels.model_tables import HeadNorms, LoRASite, RopeTable
from loraplex_kernels.native import MAX_GROUPS, load_native


class CpuBackend:
    """Batches are host tensors already: there is nothing to bring anywhere."""

    def prepare(
        self,
        attention: AttentionBatch,
        lora: LoRABatch | None,
        more_lora: Sequence[LoRABatch] = (),
    ) -> CpuOps:
        return CpuOps(attention, (*((lora,) if lora else ()), *more_lora))


class CpuOps:
    """Implements `ops.StepOps`.

    Attributes:
        attention: the batch these are bound to.
        lora: likewise, added one after the other.
    """

    def __init__(self, attention: AttentionBatch, lora: Sequence[LoRABatch]) -> None:
        self.attention = attention
        self.lora = lora
        self._cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
        self._halves: list[CpuLoRAHalves] | None = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return reference.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return reference.silu_mul(gate_up)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        rope: RopeTable,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        if self._cos_sin is None:  # every layer rotates by the same angles
            self._cos_sin = rope.at(self.attention.positions)
        kv_heads, head_dim = kv.shape[3:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_heads = heads.shape[1] - 2 * kv_heads
        qk, value = heads[:, :-kv_heads], heads[:, -kv_heads:]
        if norms is not None:
            weight = torch.cat(
                (
                    norms.q.unsqueeze(-2).expand(*norms.q.shape[:-1], num_heads, -1),
                    norms.k.unsqueeze(-2).expand(*norms.k.shape[:-1], kv_heads, -1),
                ),
                dim=-2,
            )
            qk = reference.rms_norm(qk, weight, eps)
        qk = reference.rotate(qk, *self._cos_sin)
        reference.write_kv(kv, qk[:, num_heads:], value, self.attention)
        return qk[:, :num_heads]

    @property
    def lora_halves(self) -> list[CpuLoRAHalves]:
        if self._halves is None:
            self._halves = [CpuLoRAHalves(batch) for batch in self.lora]
        return self._halves

    def attend(
        self, query: torch.Tensor, kv: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        return paged_attention(query, kv, self.attention, scale=scale, window=window)

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        for batch in self.lora:
            add_lora(
                y,
                x,
                pool_layer,
                batch,
                layer=layer,
                projections=site.projections,
                out_features=site.out_features,
            )


class CpuLoRAHalves:
    """Implements `ops.LoRAHalves`."""

    def __init__(self, batch: LoRABatch) -> None:
        self._batch = batch
        self._layouts: dict[tuple[int, bytes], PlaneLayout] = {}
        self._orders: dict[tuple[int, bytes], torch.Tensor] = {}

    def shrink(
        self, x: torch.Tensor, pool_layer: torch.Tensor, *, layer: int, site: LoRASite
    ) -> torch.Tensor:
        batch, projections = self._batch, site.projections
        native, x = load_native(), x.contiguous()
        if native is None or not native.takes(x, pool_layer):
            return reference.shrink(x, pool_layer, batch, layer=layer, projections=projections)
        planes = self._layout(batch.own_ranks, layer, site)
        return native.shrink(x, pool_layer, batch, planes, layer=layer, projections=projections)

    def expand(
        self,
        y: torch.Tensor,
        planes: torch.Tensor,
        pool_layer: torch.Tensor,
        *,
        layer: int,
        site: LoRASite,
    ) -> None:
        batch, projections, widths = self._batch, site.projections, site.out_features
        native = load_native()
        if native is None or not native.takes(pool_layer):
            reference.expand(
                y,
                planes,
                pool_layer,
                batch,
                layer=layer,
                projections=projections,
                out_features=widths,
            )
            return
        total = y if y.stride(1) == 1 and y.dtype is torch.float32 else y.float().contiguous()
        native.expand(
            total,
            planes,
            pool_layer,
            batch,
            self._layout(batch.ranks, layer, site),
            layer=layer,
            projections=projections,
            out_features=widths,
        )
        if total is not y:
            y.copy_(total)

    def _layout(self, ranks: torch.Tensor, layer: int, site: LoRASite) -> PlaneLayout:
        own = ranks[layer].numpy()[:, list(site.projections)]
        key = site.index, own.tobytes()  # nearly always all layers have the same
        if key not in self._layouts:
            self._layouts[key] = PlaneLayout.of(self._batch.seg_indptr.numpy(), own)
        return self._layouts[key]

    def gather_order(self, *, layer: int, site: LoRASite, num_ranks: int) -> torch.Tensor:
        batch = self._batch
        assert batch.a_ranks is not None, "the adapters are cut over ranks"
        modules = list(site.projections)
        ranks = batch.ranks[layer].numpy()[:, modules]
        key = site.index, ranks.tobytes()
        if key not in self._orders:
            cut_ranks = batch.a_ranks[layer].numpy()[:, modules]
            order = gather_order(batch.seg_indptr.numpy(), ranks, cut_ranks, num_ranks)
            self._orders[key] = torch.from_numpy(order)
        return self._orders[key]


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
    if native is None or not native.takes(x, pool_layer):
        reference.add_lora(
            y, x, pool_layer, batch, layer=layer, projections=projections, out_features=out_features
        )
        return
    total = y.float().contiguous()
    native.add_lora(
        total, x, pool_layer, batch, layer=layer, projections=projections, out_features=out_features
    )
    if total is not y:
        y.copy_(total)


def paged_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """See `reference.paged_attention`."""
    native = load_native()
    groups = query.shape[1] // kv.shape[3]
    if native is not None and native.takes(kv) and groups <= MAX_GROUPS:
        exact = query.float().contiguous()
        return native.paged_attention(exact, kv, batch, scale=scale, window=window)
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
