"""The GPU path: a step's batches as work lists in device memory, for operations by Triton kernels.

Import it only where Triton is to be used; `ops.py` does.

The tables are at fixed addresses (`static_tables`), so operations bound to them once can be
captured in a CUDA graph and replayed for every later step (decision record 8). A step that
outgrows them gets tables of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Final

import torch

from loraplex_kernels.attention_launch import DecodeScratch
from loraplex_kernels.attention_work import (
    AttentionTables,
    AttentionTiling,
    AttentionWork,
    build_attention_work,
)
from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.gpu_halves import GpuLoRAHalves
from loraplex_kernels.gpu_ops import GpuOps
from loraplex_kernels.lora_exchange import (
    ExchangeTables,
    build_exchange,
    order_elems,
    recorded_orders,
    recorded_sizes,
)
from loraplex_kernels.lora_shape import LoRAShape
from loraplex_kernels.lora_work import (
    ITEM_FIELDS,
    NUM_LAUNCHES,
    LoRATables,
    LoRAWork,
    build_lora_work,
)
from loraplex_kernels.model_tables import KernelModel, LoRASite, StepCapacity
from loraplex_kernels.plane_places import IntArray
from loraplex_kernels.static_tables import StaticTables, TablesFull

#: Programs of a persistent grid, for each multiprocessor: as many as 72 registers a thread leave
#: room for. One more would begin its share of the list when another has ended its own.
_LORA_PROGRAMS: Final = 7

#: Decode programs that fit on one at a time, by compute capability: more would wait for a wave.
_ATTENTION_PROGRAMS: Final = {80: 2, 90: 3}

#: Programs under the interpreter, where each costs milliseconds; two, so that they do take turns.
_INTERPRETED_PROGRAMS: Final = 2

#: LoRA items and page ids of adapters that the static tables hold: 256 adapters on all linears.
_MAX_LORA_ITEMS: Final = 1 << 16
_MAX_LORA_PAGES: Final = 1 << 18


class GpuBackend:
    """Implements `ops.DeviceBackend`. Owns the static tables and the scratch of every layer."""

    def __init__(self, model: KernelModel, capacity: StepCapacity, device: torch.device) -> None:
        self._model = model
        self._capacity = capacity
        self._device = device
        capability = _capability(device)
        self._lora_programs = _num_programs(_LORA_PROGRAMS, device)
        self._attention_programs = _num_programs(
            _ATTENTION_PROGRAMS[80 if capability < 90 else 90], device
        )
        self._tiling = AttentionTiling.of(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            elem_bytes=model.dtype.itemsize,
            capability=capability,
        )
        self._lora_shapes = [
            LoRAShape.of(site, chunk_elems=model.chunk_elems, page_elems=model.page_elems)
            for site in model.sites
        ]
        shapes = self._attention_table_shapes() | self._lora_table_shapes()
        self._tables = StaticTables(shapes | self._order_table_shapes(), device)
        self._scratch = self._new_scratch(self._max_decode_items)
        # What several devices exchange is made anew for each site of each step.
        plane_elems = 0 if self._is_sharded else capacity.plane_elems
        self._planes = torch.empty(plane_elems, dtype=torch.float32, device=device)

    @property
    def _is_sharded(self) -> bool:
        return self._model.num_ranks > 1

    @property
    def _max_decode_items(self) -> int:
        """A sequence's last split may be short; the others cover whole pages of its own."""
        in_pages = self._capacity.max_pages * self._model.page_tokens // self._tiling.split_tokens
        return self._capacity.max_sequences + in_pages

    def prepare(
        self,
        attention: AttentionBatch,
        lora: LoRABatch | None,
        more_lora: Sequence[LoRABatch] = (),
    ) -> GpuOps:
        """Bring a step of any size to the device; its operations are good for this step alone."""
        ops = self._prepare(attention, lora)
        if self._is_sharded:
            more = tuple(map(self._halves, more_lora))
            return replace(ops, lora_halves=ops.lora_halves + more)
        if not more_lora:
            return ops
        works = (build_lora_work(batch, self._lora_shapes) for batch in more_lora)
        return replace(ops, more_lora=tuple(work.to(self._device) for work in works))

    def _prepare(self, attention: AttentionBatch, lora: LoRABatch | None) -> GpuOps:
        num_rows = len(attention.positions)
        attention_work, lora_work = self._lay_out(attention, lora, num_rows)
        if self._try_upload(attention_work, lora_work):
            items = len(attention_work.prefill_items)
            lora_tables = None
            if lora_work is not None:
                lora_tables = self._static_lora(
                    is_serial=lora_work.is_serial, is_weighted=lora_work.is_weighted
                )
            tables, scratch = self._static_attention(num_rows, items), self._scratch
        else:
            tables = attention_work.to(self._device)
            scratch = self._new_scratch(len(tables.decode_items))
            lora_tables = lora_work.to(self._device) if lora_work else None
        if lora is None or lora_tables is None or not self._is_sharded:
            return self._ops(tables, scratch, lora_tables)
        return self._ops(tables, scratch, None, (self._halves(lora, lora_tables),))

    def _halves(self, batch: LoRABatch, tables: LoRATables | None = None) -> GpuLoRAHalves:
        """Return the halves of a batch; None: it brings tables of its own."""
        if tables is None:
            tables = build_lora_work(batch, self._lora_shapes).to(self._device)
        exchange = build_exchange(batch, self._model.sites, self._model.num_ranks)
        return self._bind_halves(tables, exchange.to(self._device))

    def _bind_halves(self, tables: LoRATables, exchange: ExchangeTables) -> GpuLoRAHalves:
        return GpuLoRAHalves(tables, exchange, self._lora_shapes, self._lora_programs)

    def fill(self, attention: AttentionBatch, lora: LoRABatch | None, num_rows: int) -> bool:
        """Fill the static tables with a decode step; False when it is too large for a recording.

        Args:
            attention: sequences of one query each.
            lora: which rows use which adapter.
            num_rows: token rows after padding, as given to `static_ops`.
        """
        orders: dict[str, IntArray] = {}
        if lora is not None and self._is_sharded:
            model = self._model
            found = recorded_orders(lora, model.sites, model.num_ranks, num_rows)
            if found is None:
                return False  # it exchanges more, or otherwise, than was recorded
            orders = {
                _order_table(site): order for site, order in zip(model.sites, found, strict=True)
            }
        attention_work, lora_work = self._lay_out(attention, lora, num_rows)
        if lora_work is not None and (
            lora_work.is_serial != self._is_sharded or lora_work.is_weighted
        ):
            return False  # computed by another kernel than the recorded one
        return self._try_upload(attention_work, lora_work, orders)

    def static_ops(self, num_rows: int, *, has_lora: bool) -> GpuOps:
        """Return the operations of all decode steps of `num_rows`, whatever `fill` brings."""
        lora = self._static_lora(is_serial=self._is_sharded) if has_lora else None
        attention = self._static_attention(num_rows, num_prefill_items=0)
        if lora is None or not self._is_sharded:
            return self._ops(attention, self._scratch, lora)
        halves = self._bind_halves(lora, self._static_exchange(num_rows))
        return self._ops(attention, self._scratch, None, (halves,))

    def _lay_out(
        self, attention: AttentionBatch, lora: LoRABatch | None, num_rows: int
    ) -> tuple[AttentionWork, LoRAWork | None]:
        attention_work = build_attention_work(
            attention,
            page_tokens=self._model.page_tokens,
            tiling=self._tiling,
            num_rows=num_rows,
        )
        return attention_work, build_lora_work(lora, self._lora_shapes) if lora else None

    def _try_upload(
        self,
        attention: AttentionWork,
        lora: LoRAWork | None,
        orders: Mapping[str, IntArray] | None = None,
    ) -> bool:
        arrays = {f.name: getattr(attention, f.name) for f in fields(attention)}
        if lora is not None:
            if lora.plane_elems > self._capacity.plane_elems:
                return False
            arrays |= {f"lora_{name}": getattr(lora, name) for name in _LORA_TABLES}
            arrays |= orders or {}
        try:
            self._tables.upload(arrays)
        except TablesFull:
            return False
        return True

    def _ops(
        self,
        attention: AttentionTables,
        scratch: DecodeScratch,
        lora: LoRATables | None,
        halves: tuple[GpuLoRAHalves, ...] = (),
    ) -> GpuOps:
        return GpuOps(
            attention=attention,
            scratch=scratch,
            tiling=self._tiling,
            lora=lora,
            lora_shapes=self._lora_shapes,
            lora_programs=self._lora_programs,
            attention_programs=self._attention_programs,
            lora_halves=halves,
        )

    def _static_attention(self, num_rows: int, num_prefill_items: int) -> AttentionTables:
        """Return the static tables, those cut to the step that bound how much is launched."""
        views = self._tables.views
        cut = {
            "item_start": views["item_start"][: min(num_rows, self._capacity.max_sequences) + 1],
            "prefill_items": views["prefill_items"][:num_prefill_items],
            "positions": views["positions"][:num_rows],
            "slots": views["slots"][:num_rows],
        }
        return AttentionTables(**{f.name: views[f.name] for f in fields(AttentionTables)} | cut)

    def _static_lora(self, *, is_serial: bool, is_weighted: bool = False) -> LoRATables:
        views = (self._tables.views[f"lora_{name}"] for name in _LORA_TABLES)
        rows, pages, spans, items = views
        return LoRATables(rows, pages, spans, items, self._planes, is_serial, is_weighted)

    def _static_exchange(self, num_rows: int) -> ExchangeTables:
        """Return what all recorded steps of `num_rows` exchange, in every layer."""
        model, views = self._model, self._tables.views
        sizes = recorded_sizes(model.sites, model.num_ranks, num_rows)
        orders = [views[_order_table(site)][: order_elems(site, num_rows)] for site in model.sites]
        return ExchangeTables([0] * model.num_layers, [sizes], [orders])

    def _new_scratch(self, num_items: int) -> DecodeScratch:
        model = self._model
        return DecodeScratch.allocate(num_items, model.num_heads, model.head_dim, self._device)

    def _attention_table_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, sequences = self._capacity.max_tokens, self._capacity.max_sequences
        # A sequence's new tokens may begin and end inside a tile.
        prefill_items = tokens // self._tiling.query_tile + 2 * sequences
        return {
            "pages": (self._capacity.max_pages,),
            "page_start": (sequences,),
            "context_lens": (sequences,),
            "query_start": (sequences + 1,),
            "decode_items": (self._max_decode_items, 2),
            "item_start": (sequences + 1,),
            "prefill_items": (prefill_items, 2),
            "counts": (3,),
            "positions": (tokens,),
            "slots": (tokens,),
        }

    def _lora_table_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "lora_rows": (self._capacity.max_tokens,),
            "lora_pages": (_MAX_LORA_PAGES,),
            "lora_spans": (self._model.num_layers, len(self._lora_shapes), NUM_LAUNCHES, 2),
            "lora_items": (_MAX_LORA_ITEMS, ITEM_FIELDS),
        }

    def _order_table_shapes(self) -> dict[str, tuple[int, ...]]:
        if not self._is_sharded:
            return {}
        max_rows = self._capacity.max_sequences
        return {_order_table(site): (order_elems(site, max_rows),) for site in self._model.sites}


_LORA_TABLES: Final = ("rows", "pages", "spans", "items")


def _order_table(site: LoRASite) -> str:
    return f"lora_order_{site.index}"


def _capability(device: torch.device) -> int:
    """Return the compute capability, ten times the version; under the interpreter it is moot."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _num_programs(per_processor: int, device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return per_processor * int(torch.cuda.get_device_properties(device).multi_processor_count)
