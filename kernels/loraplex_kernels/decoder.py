"""The compiled forward pass (`csrc/decoder.h`): a program of operations over one step's tokens."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.model_tables import HeadNorms, KernelModel, RopeTable
from loraplex_kernels.native import NativeKernels, struct_fields
from loraplex_kernels.packed_linear import LinearStruct, PackedLinear


class Op(enum.IntEnum):
    """The operations of a layer, in their order. Behind the last layer come two more: the norm
    of the rows whose logits are wanted, and the head.
    """

    INPUT_NORM = 0
    QKV = 1
    ROTATE = 2
    ATTEND = 3
    O = 4  # noqa: E741 - the projection's name in every table
    POST_NORM = 5
    GATE_UP = 6
    SILU_MUL = 7
    DOWN = 8


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's weights; norms are `[H]` or `[head_dim]`, of any dtype."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    window: int | None


class _LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *struct_fields("input_norm post_norm q_norm k_norm", "window"),
    ]


class _DecoderStruct(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_LayerStruct)),
        ("head", LinearStruct),
        *struct_fields(
            "final_norm cos sin",
            "num_layers hidden num_heads num_kv_heads head_dim intermediate rot_dim "
            "page_tokens page_elems chunk_elems",
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    ]


class _LoRAStruct(ctypes.Structure):
    _fields_ = struct_fields(
        "row_ids seg_indptr page_table ranks a_chunks b_chunks scale_chunks bias_chunks weights",
        "G page_table_width",
    )


class _StepStruct(ctypes.Structure):
    _fields_ = struct_fields(
        "pool query_indptr context_lens block_tables positions slot_pages slot_offsets loras "
        "logit_rows residual delta wide x mixed product logits norm q_norm k_norm op_ns",
        "norm_stride head_norm_stride num_pages T S N num_loras block_table_width max_context",
    )


class Decoder:
    """A model, and room for the activations of its largest step so far. One step at a time.

    Attributes:
        op_ns: int64 `[len(Op) + 2]`, to which each step adds the nanoseconds of its operations over
            all layers, then those of the last norm and of the head; None unless somebody measures.
    """

    def __init__(
        self,
        native: NativeKernels,
        model: KernelModel,
        layers: Sequence[DecoderLayer],
        final_norm: torch.Tensor,
        head: PackedLinear,
        rope: RopeTable,
        eps: float,
    ) -> None:
        """Lay a model out as the kernels take it.

        Args:
            model: `dtype` is that of all linears and of the pool.
            final_norm: `[H]`.
            rope: float32.
            eps: of all norms.
        """
        self.model = model
        self.op_ns: torch.Tensor | None = None
        self._native = native
        self._layers = layers
        self._head = head
        self._widths = {
            "residual": head.in_features,
            "delta": head.in_features,
            "wide": max(layers[0].qkv.out_features, layers[0].gate_up.out_features),
            "x": head.in_features,
            "mixed": layers[0].o.in_features,
            "product": layers[0].down.in_features,
        }
        self._buffers: dict[str, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = [rope.cos, rope.sin]  # the structs hold bare pointers
        self._layer_structs = (_LayerStruct * len(layers))(*map(self._layer_struct, layers))
        assert rope.cos.dtype is torch.float32
        self._struct = _DecoderStruct(
            layers=self._layer_structs,
            head=head.struct,
            final_norm=self._norm(final_norm),
            cos=rope.cos.data_ptr(),
            sin=rope.sin.data_ptr(),
            num_layers=len(layers),
            hidden=head.in_features,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            intermediate=layers[0].down.in_features,
            rot_dim=rope.cos.shape[1],
            page_tokens=model.page_tokens,
            page_elems=model.page_elems,
            chunk_elems=model.chunk_elems,
            eps=eps,
            scale=model.head_dim**-0.5,
            is_bf16=model.dtype is torch.bfloat16,
        )

    def _layer_struct(self, layer: DecoderLayer) -> _LayerStruct:
        return _LayerStruct(
            qkv=layer.qkv.struct,
            o=layer.o.struct,
            gate_up=layer.gate_up.struct,
            down=layer.down.struct,
            input_norm=self._norm(layer.input_norm),
            post_norm=self._norm(layer.post_norm),
            q_norm=None if layer.q_norm is None else self._norm(layer.q_norm),
            k_norm=None if layer.k_norm is None else self._norm(layer.k_norm),
            window=layer.window or 0,
        )

    def _norm(self, weight: torch.Tensor) -> int:
        self._kept.append(weight.float().contiguous())
        return self._kept[-1].data_ptr()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def start(
        self,
        embeddings: torch.Tensor,
        pool: torch.Tensor,
        attention: AttentionBatch,
        lora: Sequence[LoRABatch],
        logit_rows: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> DecoderStep:
        """Begin a step; the one before it must be over.

        Args:
            embeddings: `[T, H]`.
            pool: `[L, P, page_elems]`; KV pages are written, adapter pages read.
            attention: where the step's tokens go.
            lora: see `KernelBackend.prepare`.
            logit_rows: int64 `[N]`, the token rows whose logits are wanted; no row twice.
            out: float32 `[N, vocab]` to write logits into.
        """
        rows = max(embeddings.shape[0], logit_rows.shape[0])
        buffers = {name: self._buffer(name, rows) for name in self._widths}
        buffers["residual"][: len(embeddings)].copy_(embeddings)
        if out is None or not (out.is_contiguous() and out.dtype is torch.float32):
            logits = torch.empty((logit_rows.shape[0], self._head.out_features))
        else:
            logits = out
        return DecoderStep(
            self._native,
            self._struct,
            buffers,
            pool,
            attention,
            lora,
            logit_rows,
            logits,
            self.op_ns,
        )

    def _buffer(self, name: str, rows: int) -> torch.Tensor:
        """Return at least so many rows; what is in them is of an earlier step."""
        known = self._buffers.get(name)
        if known is None or known.shape[0] < rows:
            dtype = self.model.dtype if name in ("x", "mixed", "product") else torch.float32
            known = torch.empty((rows, self._widths[name]), dtype=dtype)
            self._buffers[name] = known
        return known


class DecoderStep:
    """One step on its way through the program.

    Attributes:
        x: `[T, H]`, input of qkv and gate_up; behind the last layer `[N, H]`, of the head.
        mixed: `[T, heads * head_dim]`, input of o.
        product: `[T, intermediate]`, input of down.
        logits: float32 `[N, vocab]`, once the head has run.
    """

    def __init__(
        self,
        native: NativeKernels,
        model: _DecoderStruct,
        buffers: dict[str, torch.Tensor],
        pool: torch.Tensor,
        attention: AttentionBatch,
        lora: Sequence[LoRABatch],
        logit_rows: torch.Tensor,
        logits: torch.Tensor,
        op_ns: torch.Tensor | None,
    ) -> None:
        self._native = native
        self._model = model
        self._num_tokens = attention.positions.shape[0]
        self._num_logits = logit_rows.shape[0]
        self._x = buffers["x"]
        self.mixed = buffers["mixed"][: self._num_tokens]
        self.product = buffers["product"][: self._num_tokens]
        self.logits = logits
        self._loras = (_LoRAStruct * len(lora))(*map(_lora_struct, lora))
        self._kept = (buffers, pool, attention, lora, logit_rows, op_ns)
        self._struct = _StepStruct(
            pool=pool.data_ptr(),
            query_indptr=attention.query_indptr.data_ptr(),
            context_lens=attention.context_lens.data_ptr(),
            block_tables=attention.block_tables.data_ptr(),
            positions=attention.positions.data_ptr(),
            slot_pages=attention.slot_pages.data_ptr(),
            slot_offsets=attention.slot_offsets.data_ptr(),
            loras=ctypes.addressof(self._loras),
            logit_rows=logit_rows.data_ptr(),
            logits=logits.data_ptr(),
            op_ns=None if op_ns is None else op_ns.data_ptr(),
            num_pages=pool.shape[1],
            T=self._num_tokens,
            S=attention.context_lens.shape[0],
            N=self._num_logits,
            num_loras=len(lora),
            block_table_width=attention.block_tables.shape[1],
            max_context=attention.max_context,
            **{name: buffer.data_ptr() for name, buffer in buffers.items()},
        )

    @property
    def x(self) -> torch.Tensor:
        return self._x[: self._num_tokens]

    @property
    def head_input(self) -> torch.Tensor:
        """`[N, H]`, what the head multiplies, once the last norm has run."""
        return self._x[: self._num_logits]

    def head(self, first: int, stop: int) -> torch.Tensor:
        """Return the logits of the rows `[first, stop)` of `head_input`, float32, by the head
        alone; `logits` stays as it is.
        """
        at = self._model.num_layers * len(Op) + 1
        whole = self._struct.x, self._struct.N, self._struct.logits
        logits = torch.empty((stop - first, self._model.head.N))
        self._struct.x = self.head_input[first:stop].data_ptr()
        self._struct.N = stop - first
        self._struct.logits = logits.data_ptr()
        self.run(at, at + 1)
        self._struct.x, self._struct.N, self._struct.logits = whole
        return logits

    def run(
        self,
        first: int,
        stop: int,
        *,
        norm: torch.Tensor | None = None,
        head_norms: HeadNorms | None = None,
    ) -> None:
        """Run the operations `[first, stop)`, counted over all layers (`len(Op)` of each).

        Args:
            norm: weights instead of the model's, for the norms of this stretch: `[H]`, or one row
                for each of theirs.
            head_norms: the same for the heads' norms.
        """
        kept = []  # until the call is over
        if norm is not None:
            norm = norm.float().contiguous()
            self._struct.norm, self._struct.norm_stride = norm.data_ptr(), _row_stride(norm)
        if head_norms is not None:
            kept = [weight.float().contiguous() for weight in (head_norms.q, head_norms.k)]
            self._struct.q_norm, self._struct.k_norm = (weight.data_ptr() for weight in kept)
            self._struct.head_norm_stride = _row_stride(kept[0])
        self._native.call("loraplex_decode", self._model, self._struct, first, stop)
        self._struct.norm = self._struct.q_norm = self._struct.k_norm = None
        self._struct.norm_stride = self._struct.head_norm_stride = 0


def _row_stride(weight: torch.Tensor) -> int:
    return weight.shape[-1] if weight.dim() == 2 else 0


def _lora_struct(batch: LoRABatch) -> _LoRAStruct:
    return _LoRAStruct(
        row_ids=batch.row_ids.data_ptr(),
        seg_indptr=batch.seg_indptr.data_ptr(),
        page_table=batch.page_table.data_ptr(),
        ranks=batch.ranks.data_ptr(),
        a_chunks=batch.a_chunks.data_ptr(),
        b_chunks=batch.b_chunks.data_ptr(),
        scale_chunks=None if batch.scale_chunks is None else batch.scale_chunks.data_ptr(),
        bias_chunks=None if batch.bias_chunks is None else batch.bias_chunks.data_ptr(),
        weights=None if batch.weights is None else batch.weights.data_ptr(),
        G=batch.num_segments,
        page_table_width=batch.page_table.shape[1],
    )
