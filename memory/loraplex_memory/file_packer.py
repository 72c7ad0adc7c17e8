"""From an adapter's file to pages in host memory, by compiled code where there is any.

Whatever holds the interpreter beside the steps holds them up. So what follows from a file's header
is kept: adapters of one kind (modules, ranks, scale, dtype) have the same one, byte for byte, and
then reading and packing are a few calls that let go of the interpreter.
Adapters with parts are rare; torch packs them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch

from loraplex_memory.adapter_file import RawAdapterFile, read_raw_adapter
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.host_pages import HostPages
from loraplex_memory.layout import PROJECTIONS, Projection
from loraplex_memory.packing import check_weights, layer_ends, pack_adapter
from loraplex_memory.scratch import Scratch

#: Headers that are remembered, of some 20 kB each: as many kinds of adapters.
_MAX_PLANS: Final = 64

#: int64 that tell the compiled code of one module.
_RECORD_FIELDS: Final = 15

#: As the compiled code numbers them.
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class CompiledPack(Protocol):
    """`loraplex_kernels.native.NativeKernels.pack`; says what each argument is."""

    def __call__(
        self,
        data: torch.Tensor,
        modules: torch.Tensor,
        scales: torch.Tensor,
        ends: torch.Tensor,
        slab: torch.Tensor,
        pages: torch.Tensor,
    ) -> None: ...


@dataclass(frozen=True)
class _Plan:
    """Where everything goes that a file with one header holds; has been checked."""

    layout: AdapterLayout
    data_bytes: int
    modules: torch.Tensor
    scales: torch.Tensor
    ends: torch.Tensor


class FilePacker:
    """Owned by one thread, the loader's.

    Args:
        dtype: the pool's.
        pack: the compiled code; None to use torch's operations, with the same bits.
        rank: whose part to pack, where the model is cut over devices.
    """

    def __init__(self, dtype: torch.dtype, pack: CompiledPack | None = None, rank: int = 0) -> None:
        self._dtype = dtype
        self._rank = rank
        self._pack = pack
        self._file_memory = Scratch()
        self._pack_memory = Scratch()
        self._plans: OrderedDict[bytes, _Plan] = OrderedDict()

    def fill(self, pages: HostPages, path: Path, layout: AdapterLayout) -> None:
        """Read the adapter at `path` into as many pages as its layout says.

        Raises:
            AdapterFileError: the file is missing, truncated, of another format or incomplete, or
                the disk does not give it.
            ValueError: it is not the adapter that the layout is of.
        """
        assert len(pages) == layout.num_pages
        file = read_raw_adapter(path, self._file_memory)
        if self._pack is None or layout.spec.parts:
            packed = pack_adapter(
                file.weights(),
                layout,
                dtype=self._dtype,
                scratch=self._pack_memory,
                rank=self._rank,
            )
            pages.fill(packed)
            return
        plan = self._plan(file, layout)
        index = torch.tensor(pages.pages, dtype=torch.int64)
        self._pack(file.data, plan.modules, plan.scales, plan.ends, pages.slab, index)

    def _plan(self, file: RawAdapterFile, layout: AdapterLayout) -> _Plan:
        plan = self._plans.get(file.header)
        if plan is None or plan.data_bytes != len(file.data) or plan.layout != layout:
            weights = file.weights()
            check_weights(weights, layout)
            plan = _make_plan(weights, layout, file.data, self._rank)
            self._plans[file.header] = plan
        self._plans.move_to_end(file.header)
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)
        return plan


def _make_plan(
    weights: AdapterWeights, layout: AdapterLayout, data: torch.Tensor, rank: int
) -> _Plan:
    modules = [
        _record(layer, projection, pair, layout, data.data_ptr(), rank)
        for (layer, projection), pair in weights.lora.items()
    ]
    return _Plan(
        layout,
        len(data),
        torch.tensor(modules, dtype=torch.int64).view(-1, _RECORD_FIELDS),
        torch.tensor([pair.scale for pair in weights.lora.values()], dtype=torch.float32),
        torch.tensor(layer_ends(layout), dtype=torch.int64),
    )


def _record(
    layer: int,
    projection: Projection,
    pair: LoRAPair,
    layout: AdapterLayout,
    data_address: int,
    rank: int,
) -> tuple[int, ...]:
    """Return where one rank's part of a module lies and goes, as `CompiledPack` takes it."""
    at, partition = PROJECTIONS.index(projection), layout.pool.partition
    rows = partition.a_ranks(projection, pair.rank, rank)
    columns = partition.inputs(projection, rank)
    outputs = partition.outputs(projection, rank)
    a_chunk, b_chunk = layout.a_chunks[layer][at], layout.b_chunks[layer][at]
    in_features = pair.a.shape[1]
    first_a = rows.start * in_features + columns.start
    return (
        layer,
        pair.rank,
        _DTYPES.index(pair.a.dtype),
        pair.a.data_ptr() - data_address + first_a * pair.a.itemsize,
        a_chunk * layout.pool.chunk_elems,
        in_features,
        rows.stop - rows.start,
        columns.stop - columns.start,
        rows.width,
        columns.width,
        _DTYPES.index(pair.b.dtype),
        pair.b.data_ptr() - data_address + outputs.start * pair.rank * pair.b.itemsize,
        b_chunk * layout.pool.chunk_elems,
        outputs.stop - outputs.start,
        outputs.width,
    )
