"""The forward pass on a CPU with compiled kernels: one call per step, whoever is in it.

Where adapters change something between operations, the program runs in pieces: the same code on the
same buffers, so nobody else's bits change. Activations stay float32 between linears; a linear reads
them rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.decoder import Decoder, DecoderLayer, DecoderStep, Op
from loraplex_kernels.model_tables import HeadNorms, KernelModel
from loraplex_kernels.native import MAX_GROUPS, load_native
from loraplex_kernels.packed_linear import PackedLinear
from loraplex_memory.adapter_spec import INPUT_NORM, POST_NORM
from loraplex_memory.pool import PagePool
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.rope import build_rope_table
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.weights import LayerWeights, ModelWeights


@dataclass(frozen=True)
class CpuStates:
    """Implements `FinalStates`: they lie in the program's buffers."""

    step: DecoderStep
    edits: AdapterEdits | None

    @property
    def x(self) -> torch.Tensor:
        return self.step.head_input

    def logits(self, first: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FinalStates`."""
        logits = self.step.head(first, stop)
        if self.edits is not None:
            self.edits.head(logits, self.x[first:stop], first)
        return logits if out is None else out.copy_(logits)


class CpuDecoder:
    """A model's weights as the kernels take them, bound to the geometry of one pool.

    Attributes:
        decoder: the compiled program.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, model: KernelModel, max_model_len: int
    ) -> None:
        native = load_native()
        assert native is not None, "ask `can_decode` first"
        self._weights = weights
        rope = build_rope_table(
            spec.rope, max_model_len, dtype=torch.float32, device=torch.device("cpu")
        )
        layers = [
            _decoder_layer(layer, window)
            for layer, window in zip(weights.layers, spec.sliding_windows, strict=True)
        ]
        self.decoder = Decoder(
            native,
            model,
            layers,
            weights.norm,
            _packed(weights.lm_head.packed),
            rope,
            spec.rms_norm_eps,
        )

    def forward(
        self,
        token_ids: torch.Tensor,
        attention: AttentionBatch,
        lora: Sequence[LoRABatch],
        pool: PagePool,
        logit_rows: torch.Tensor | None,
        *,
        out: torch.Tensor | None,
        edits: AdapterEdits | None,
    ) -> torch.Tensor:
        """See `Transformer.forward`."""
        if logit_rows is None:
            logit_rows = torch.arange(token_ids.shape[0])
        step = self._start(token_ids, attention, lora, pool, logit_rows, edits, out)
        norm_at = self.decoder.num_layers * len(Op)
        if edits is not None:
            self._edited_layers(step, edits, pool)
            step.run(
                norm_at, norm_at + 1, norm=edits.final_norm(self._weights.norm, len(logit_rows))
            )
            step.run(norm_at + 1, norm_at + 2)
            edits.head(step.logits, step.head_input)
        else:
            step.run(0, norm_at + 2 if len(logit_rows) else norm_at)
        return step.logits if out is None or out is step.logits else out.copy_(step.logits)

    def final_states(
        self,
        token_ids: torch.Tensor,
        attention: AttentionBatch,
        lora: Sequence[LoRABatch],
        pool: PagePool,
        rows: torch.Tensor,
        edits: AdapterEdits | None,
    ) -> CpuStates:
        """See `Transformer.final_states`."""
        no_logits = torch.empty((0, self._weights.embedding.shape[0]))
        step = self._start(token_ids, attention, lora, pool, rows, edits, no_logits)
        norm_at = self.decoder.num_layers * len(Op)
        norm = None
        if edits is not None:
            self._edited_layers(step, edits, pool)
            norm = edits.final_norm(self._weights.norm, len(rows))
        step.run(norm_at if edits is not None else 0, norm_at + 1, norm=norm)
        return CpuStates(step, edits)

    def _start(
        self,
        token_ids: torch.Tensor,
        attention: AttentionBatch,
        lora: Sequence[LoRABatch],
        pool: PagePool,
        logit_rows: torch.Tensor,
        edits: AdapterEdits | None,
        out: torch.Tensor | None,
    ) -> DecoderStep:
        embedding = self._weights.embedding
        embedded = (
            F.embedding(token_ids, embedding)
            if edits is None
            else edits.embed(token_ids, lambda ids: F.embedding(ids, embedding), len(embedding))
        )
        return self.decoder.start(embedded, pool.data, attention, lora, logit_rows, out)

    def _edited_layers(self, step: DecoderStep, edits: AdapterEdits, pool: PagePool) -> None:
        for layer in range(self.decoder.num_layers):
            self._edited_layer(step, layer, edits, pool)

    def _edited_layer(
        self, step: DecoderStep, index: int, edits: AdapterEdits, pool: PagePool
    ) -> None:
        layer, at = self._weights.layers[index], index * len(Op)
        step.run(
            at + Op.INPUT_NORM, at + Op.QKV, norm=edits.norm(INPUT_NORM, index, layer.input_norm)
        )
        edits.scale_input(step.x, index, "qkv")
        step.run(at + Op.QKV, at + Op.ROTATE)
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = edits.head_norms(HeadNorms(layer.q_norm, layer.k_norm), index)
        step.run(at + Op.ROTATE, at + Op.ATTEND, head_norms=norms)
        edits.write_prefix(pool.kv(index), index)
        step.run(at + Op.ATTEND, at + Op.O)
        edits.scale_input(step.mixed, index, "o")
        step.run(at + Op.O, at + Op.POST_NORM)
        step.run(
            at + Op.POST_NORM, at + Op.GATE_UP, norm=edits.norm(POST_NORM, index, layer.post_norm)
        )
        edits.scale_input(step.x, index, "gate_up")
        step.run(at + Op.GATE_UP, at + Op.DOWN)
        edits.scale_input(step.product, index, "down")
        step.run(at + Op.DOWN, at + len(Op))


def can_decode(spec: ModelSpec, weights: ModelWeights) -> bool:
    """Whether the compiled kernels took all of these weights, as this machine has some."""
    geometry = spec.geometry
    is_packed = all(linear.packed is not None for linear in weights.linears)
    return is_packed and geometry.num_heads // geometry.num_kv_heads <= MAX_GROUPS


def _decoder_layer(layer: LayerWeights, window: int | None) -> DecoderLayer:
    return DecoderLayer(
        layer.input_norm,
        _packed(layer.qkv.packed),
        layer.q_norm,
        layer.k_norm,
        _packed(layer.o.packed),
        layer.post_norm,
        _packed(layer.gate_up.packed),
        _packed(layer.down.packed),
        window,
    )


def _packed(linear: PackedLinear | None) -> PackedLinear:
    assert linear is not None, "ask `can_decode` first"
    return linear
