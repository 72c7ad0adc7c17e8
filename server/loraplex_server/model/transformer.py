"""The decoder: one forward pass over the tokens of a step, over paged KV, with paged LoRA.

Numerics follow transformers operation by operation (float32 RMSNorm rounded before its weight,
rotation in the model's dtype), so that float32 logits agree to rounding and greedy tokens are the
same. The pass holds no state: KV lives in the pool, what to compute is in its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loraplex_kernels import ops
from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_memory.layout import PROJECTIONS, SITES, ModelGeometry, Site
from loraplex_memory.pool import PagePool
from loraplex_server.model.errors import UnsupportedModel
from loraplex_server.model.rope import RopeTable, rotate
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.weights import LayerWeights, ModelWeights


@dataclass(frozen=True)
class LoRASite:
    """Projections that share an input, as `ops.add_lora` takes them."""

    projections: tuple[int, ...]
    out_features: tuple[int, ...]

    @classmethod
    def of(cls, site: Site, geometry: ModelGeometry) -> LoRASite:
        names = SITES[site]
        return cls(
            tuple(PROJECTIONS.index(name) for name in names),
            tuple(geometry.out_features(name) for name in names),
        )


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass needs."""

    attention: AttentionBatch
    lora: LoRABatch | None
    pool: PagePool
    cos: torch.Tensor
    sin: torch.Tensor


class Transformer:
    """Owned by the engine process; immutable after construction."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, *, max_model_len: int | None = None
    ) -> None:
        """Prepare the tables of a model.

        Args:
            spec: what to compute.
            weights: its parameters, on the device to compute on.
            max_model_len: longest sequence to serve; decides between the short and the long
                regime of longrope. Default: all that the model has positions for.

        Raises:
            UnsupportedModel: `max_model_len` is beyond the model's positions.
        """
        longest = spec.max_position_embeddings
        if max_model_len is not None and not 0 < max_model_len <= longest:
            raise UnsupportedModel(
                field="max_model_len",
                value=max_model_len,
                reason=f"{spec.base_name} has max_position_embeddings = {longest}",
            )
        self.spec = spec
        self.max_model_len = max_model_len or longest
        self._weights = weights
        self._rope = RopeTable.build(
            spec.rope, self.max_model_len, dtype=weights.dtype, device=weights.device
        )
        self._head_norms = [_head_norm(spec.geometry, layer) for layer in weights.layers]
        self._qkv_site = LoRASite.of("qkv", spec.geometry)
        self._o_site = LoRASite.of("o", spec.geometry)
        self._gate_up_site = LoRASite.of("gate_up", spec.geometry)
        self._down_site = LoRASite.of("down", spec.geometry)

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        attention: AttentionBatch,
        lora: LoRABatch | None,
        pool: PagePool,
        logit_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the tokens of a step, write their KV, and return logits of some of them.

        Args:
            token_ids: int64 `[T]`, sequence by sequence.
            attention: where each token belongs.
            lora: which rows use which adapter; None for the base model alone.
            pool: KV pages (written) and adapter pages (read).
            logit_rows: int64 `[N]`, the token rows whose logits are wanted.

        Returns:
            float32 `[N, vocab_size]`.
        """
        cos, sin = self._rope.at(attention.positions)
        step = _Step(attention, lora, pool, cos, sin)
        hidden = F.embedding(token_ids, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            hidden = self._attend(hidden, index, layer, step)
            hidden = self._mlp(hidden, index, layer, step)
        last = self._norm(hidden.index_select(0, logit_rows), self._weights.norm)
        return self._weights.lm_head(last).float()

    def _attend(
        self, hidden: torch.Tensor, index: int, layer: LayerWeights, step: _Step
    ) -> torch.Tensor:
        """Return `hidden` plus attention, `[T, H]`."""
        g, pool = self.spec.geometry, step.pool
        x = self._norm(hidden, layer.input_norm)
        qkv = layer.qkv(x)
        self._add_lora(qkv, x, index, self._qkv_site, step)
        heads = qkv.view(qkv.shape[0], -1, g.head_dim)
        num_rotated = g.num_heads + g.num_kv_heads
        qk, value = heads[:, :num_rotated], heads[:, num_rotated:]
        head_norm = self._head_norms[index]
        if head_norm is not None:
            qk = self._norm(qk, head_norm)
        qk = rotate(qk, step.cos, step.sin)
        kv = pool.kv(index)
        ops.write_kv(kv, qk[:, g.num_heads :], value, step.attention)
        mixed = ops.paged_attention(
            qk[:, : g.num_heads],
            kv,
            step.attention,
            scale=g.head_dim**-0.5,
            window=self.spec.sliding_windows[index],
        ).flatten(1)
        out = layer.o(mixed)
        self._add_lora(out, mixed, index, self._o_site, step)
        return out.add_(hidden)

    def _mlp(
        self, hidden: torch.Tensor, index: int, layer: LayerWeights, step: _Step
    ) -> torch.Tensor:
        """Return `hidden` plus the gated MLP, `[T, H]`."""
        x = self._norm(hidden, layer.post_norm)
        gate_up = layer.gate_up(x)
        self._add_lora(gate_up, x, index, self._gate_up_site, step)
        gate, up = gate_up.chunk(2, dim=-1)
        product = F.silu(gate).mul_(up)
        out = layer.down(product)
        self._add_lora(out, product, index, self._down_site, step)
        return out.add_(hidden)

    def _add_lora(
        self, y: torch.Tensor, x: torch.Tensor, index: int, site: LoRASite, step: _Step
    ) -> None:
        if step.lora is not None:
            ops.add_lora(
                y,
                x,
                step.pool.layer(index),
                step.lora,
                layer=index,
                projections=site.projections,
                out_features=site.out_features,
            )

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension: float32, rounded to the dtype of `x`, then weighted."""
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.spec.rms_norm_eps)
        return normed.to(x.dtype).mul_(weight)


def _head_norm(geometry: ModelGeometry, layer: LayerWeights) -> torch.Tensor | None:
    """Return the weights of q/k norm per head, `[heads + kv_heads, D]`, so that one norm does."""
    if layer.q_norm is None or layer.k_norm is None:
        return None
    return torch.cat(
        (
            layer.q_norm.expand(geometry.num_heads, -1),
            layer.k_norm.expand(geometry.num_kv_heads, -1),
        )
    )
