"""The decoder: one forward pass over the tokens of a step, over paged KV, with paged LoRA.

Numerics follow transformers operation by operation (float32 RMSNorm rounded before its weight,
rotation in the model's dtype), so that float32 logits agree to rounding and greedy tokens are the
same. The pass holds no state: KV lives in the pool, what to compute is in its arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex_kernels.collectives import Collectives
from loraplex_kernels.cpu import CpuOps
from loraplex_kernels.model_tables import HeadNorms, KernelModel, LoRASite
from loraplex_kernels.ops import StepOps
from loraplex_memory.adapter_spec import INPUT_NORM, POST_NORM
from loraplex_memory.layout import PROJECTIONS, SITES, PoolLayout, Site
from loraplex_memory.partition import ROW_PARALLEL, Partition
from loraplex_memory.pool import PagePool
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.cpu_decoder import CpuDecoder, can_decode
from loraplex_server.model.errors import UnsupportedModel
from loraplex_server.model.final_states import FinalStates, HeadInput
from loraplex_server.model.linear import Linear
from loraplex_server.model.rope import build_rope_table
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.weights import LayerWeights, ModelWeights


class Transformer:
    """Owned by the engine process; immutable after construction."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        *,
        max_model_len: int | None = None,
        group: Collectives | None = None,
    ) -> None:
        """Prepare the tables of a model.

        Args:
            spec: what to compute.
            weights: its parameters, on the device to compute on.
            max_model_len: longest sequence to serve; decides between the short and the long
                regime of longrope. Default: all that the model has positions for.
            group: the ranks that compute the model together, each with the spec and the weights of
                its own part; they make the same calls in the same order.

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
        self._rope = build_rope_table(
            spec.rope, self.max_model_len, dtype=weights.dtype, device=weights.device
        )
        self._group = group
        partition = Partition(spec.geometry, group.num_ranks if group else 1)
        self._sites = {site: lora_site(site, partition) for site in SITES}
        self._can_decode = group is None and can_decode(spec, weights)
        self._decoder: CpuDecoder | None = None
        self._decoder_layout: PoolLayout | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def group(self) -> Collectives | None:
        """The ranks that compute the model together; None where one does."""
        return self._group

    @property
    def precision(self) -> str:
        """What a reader should know of the numbers: "bfloat16", "bfloat16 with int8 weights"."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} with int8 weights" if self._weights.is_int8 else name

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        ops: StepOps,
        pool: PagePool,
        logit_rows: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        edits: AdapterEdits | None = None,
    ) -> torch.Tensor:
        """Compute the tokens of a step, write their KV, and return logits of some of them.

        Args:
            token_ids: integers `[T]`, sequence by sequence.
            ops: the operations, bound to where each token belongs and which adapter it uses; on
                one of several ranks `ShardedOps`.
            pool: KV pages (written) and adapter pages (read).
            logit_rows: integers `[N]`, the token rows whose logits are wanted; None for all.
            out: float32 `[N, vocab_size]` to write into.
            edits: what adapters of the step change besides linears; None in most steps.

        Returns:
            float32 `[N, vocab_size]`.
        """
        if isinstance(ops, CpuOps) and (decoder := self.cpu_decoder(pool)) is not None:
            return decoder.forward(
                token_ids, ops.attention, ops.lora, pool, logit_rows, out=out, edits=edits
            )
        states = self._final_states(token_ids, ops, pool, logit_rows, edits)
        return states.logits(0, len(states.x), out)

    @torch.inference_mode()
    def final_states(
        self,
        token_ids: torch.Tensor,
        ops: StepOps,
        pool: PagePool,
        rows: torch.Tensor,
        edits: AdapterEdits | None = None,
    ) -> FinalStates:
        """Compute the tokens of a step as `forward` does, and leave the head to the caller.

        Args:
            rows: integers `[N]`, the token rows whose states are wanted; no row twice.
        """
        if isinstance(ops, CpuOps) and (decoder := self.cpu_decoder(pool)) is not None:
            return decoder.final_states(token_ids, ops.attention, ops.lora, pool, rows, edits)
        return self._final_states(token_ids, ops, pool, rows, edits)

    def _final_states(
        self,
        token_ids: torch.Tensor,
        ops: StepOps,
        pool: PagePool,
        rows: torch.Tensor | None,
        edits: AdapterEdits | None,
    ) -> HeadInput:
        layers, eps = self._weights.layers, self.spec.rms_norm_eps
        residual = self._embed(token_ids, edits)
        x = ops.rms_norm(residual, _norm(edits, INPUT_NORM, 0, layers[0].input_norm), eps)
        for index, layer in enumerate(layers):
            delta = self._attention(x, index, layer, ops, pool, edits)
            norm = _norm(edits, POST_NORM, index, layer.post_norm)
            x, residual = ops.add_rms_norm(delta, residual, norm, eps)
            delta = self._mlp(x, index, layer, ops, pool, edits)
            if index == len(layers) - 1 and rows is not None:
                delta, residual = (t.index_select(0, rows) for t in (delta, residual))
            norm = self._norm_after(index, len(delta), edits)
            x, residual = ops.add_rms_norm(delta, residual, norm, eps)
        return HeadInput(x, self._weights.lm_head, self.spec.vocab_size, edits, self._group)

    def cpu_decoder(self, pool: PagePool) -> CpuDecoder | None:
        """Return the compiled program for pools of this layout; None where there can be none."""
        if not self._can_decode or pool.dtype is not self.dtype:
            return None
        if self._decoder is None or self._decoder_layout is not pool.layout:
            model = kernel_model(pool)
            self._decoder = CpuDecoder(self.spec, self._weights, model, self.max_model_len)
            self._decoder_layout = pool.layout
        return self._decoder

    def _embed(self, token_ids: torch.Tensor, edits: AdapterEdits | None) -> torch.Tensor:
        if edits is None:
            return self._look_up(token_ids)
        return edits.embed(token_ids, self._look_up, self.spec.vocab_size)

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the base's embeddings `[T, H]`; one of several ranks has rows of some tokens."""
        weight, group = self._weights.embedding, self._group
        if group is None:
            return F.embedding(token_ids, weight)
        own = token_ids - group.rank * len(weight)
        is_elsewhere = (own < 0) | (own >= len(weight))
        x = F.embedding(own.clamp(0, len(weight) - 1), weight)
        x.masked_fill_(is_elsewhere[:, None], 0.0)
        group.all_reduce(x, "embedding")  # sums of one embedding and zeros: exact
        return x

    def _norm_after(self, index: int, num_rows: int, edits: AdapterEdits | None) -> torch.Tensor:
        """Return the weights of the norm behind layer `index`: the next layer's, or the last."""
        layers = self._weights.layers
        if index + 1 < len(layers):
            return _norm(edits, INPUT_NORM, index + 1, layers[index + 1].input_norm)
        last = self._weights.norm
        return last if edits is None else edits.final_norm(last, num_rows)

    def _attention(
        self,
        x: torch.Tensor,
        index: int,
        layer: LayerWeights,
        ops: StepOps,
        pool: PagePool,
        edits: AdapterEdits | None,
    ) -> torch.Tensor:
        """Return what attention adds to the normed `x` `[T, H]`."""
        qkv = self._linear(layer.qkv, x, index, "qkv", ops, pool, edits)
        kv = pool.kv(index)
        norms = _head_norms(layer)
        if edits is not None and norms is not None:
            norms = edits.head_norms(norms, index)
        query = ops.rotate_and_store(qkv, kv, self._rope, norms, self.spec.rms_norm_eps)
        if edits is not None:
            edits.write_prefix(kv, index)
        mixed = ops.attend(
            query,
            kv,
            scale=self.spec.geometry.head_dim**-0.5,
            window=self.spec.sliding_windows[index],
        ).flatten(1)
        return self._linear(layer.o, mixed, index, "o", ops, pool, edits)

    def _mlp(
        self,
        x: torch.Tensor,
        index: int,
        layer: LayerWeights,
        ops: StepOps,
        pool: PagePool,
        edits: AdapterEdits | None,
    ) -> torch.Tensor:
        """Return what the gated MLP adds to the normed `x` `[T, H]`."""
        gate_up = self._linear(layer.gate_up, x, index, "gate_up", ops, pool, edits)
        product = ops.silu_mul(gate_up)
        return self._linear(layer.down, product, index, "down", ops, pool, edits)

    def _linear(
        self,
        linear: Linear,
        x: torch.Tensor,
        index: int,
        site: Site,
        ops: StepOps,
        pool: PagePool,
        edits: AdapterEdits | None,
    ) -> torch.Tensor:
        """Return a site's output with all that adapters make of it; `x` may be overwritten."""
        if edits is not None:
            edits.scale_input(x, index, site)
        y = linear(x)
        lora_site = self._sites[site]
        ops.add_lora(y, x, pool.layer(index), layer=index, site=lora_site)
        if self._group is not None and lora_site.is_row_parallel:
            self._group.all_reduce(y)
            if edits is not None:
                edits.finish_output(y, index, site)
        return y


def _norm(edits: AdapterEdits | None, name: str, index: int, weight: torch.Tensor) -> torch.Tensor:
    return weight if edits is None else edits.norm(name, index, weight)


def lora_site(site: Site, partition: Partition) -> LoRASite:
    """Return the site as the kernels of one rank take it."""
    names = SITES[site]
    return LoRASite(
        index=list(SITES).index(site),
        projections=tuple(PROJECTIONS.index(name) for name in names),
        in_features=partition.inputs(names[0], 0).width,
        out_features=tuple(partition.outputs(name, 0).width for name in names),
        is_row_parallel=partition.num_ranks > 1 and names[0] in ROW_PARALLEL,
    )


def _head_norms(layer: LayerWeights) -> HeadNorms | None:
    if layer.q_norm is None or layer.k_norm is None:
        return None
    return HeadNorms(layer.q_norm, layer.k_norm)


def kernel_model(pool: PagePool) -> KernelModel:
    """Return the model and its pool as the kernels know them."""
    layout, shard = pool.layout, pool.layout.shard
    return KernelModel(
        num_layers=shard.num_layers,
        num_heads=shard.num_heads,
        num_kv_heads=shard.num_kv_heads,
        head_dim=shard.head_dim,
        page_tokens=layout.page_tokens,
        page_elems=layout.page_elems,
        chunk_elems=layout.chunk_elems,
        sites=tuple(lora_site(site, layout.partition) for site in SITES),
        dtype=pool.dtype,
        num_ranks=layout.num_ranks,
    )
