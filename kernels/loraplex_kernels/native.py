"""Compiling and calling the C files of `csrc`.

They are compiled once per machine (about a second) with the C compiler found there, for that
machine's own instruction set, and kept in the user's cache folder. OpenMP symbols resolve to the
runtime that torch has already loaded. Without a compiler `load_native` returns None and `cpu` takes
torch's own operations: slower, same results within rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex_kernels.batch import AttentionBatch, LoRABatch
from loraplex_kernels.lora_planes import PlaneLayout

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "csrc"
_SOURCES = sorted(_FOLDER.glob("*.c"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
#: The last has GCC fuse every product with its sum. For some processors it would do so in some
#: loops and not in others, and rows would differ by how many are computed together.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "--param=avoid-fma-max-bits=0",
)
_DTYPES = (torch.float32, torch.bfloat16)

#: Of weights to be packed, in the order in which `packing.c` numbers them.
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Query heads per KV head that the attention kernel has room for (MAX_ROWS).
MAX_GROUPS = 64


def struct_fields(
    pointers: str, longs: str, others: Sequence[tuple[str, Any]] = ()
) -> list[tuple[str, Any]]:
    """Return the fields of a C struct: pointers, then int64, then others; names by spaces."""
    fields: list[tuple[str, Any]] = [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_int64) for name in longs.split()]
    return [*fields, *others]


class _LoRAArgs(ctypes.Structure):
    _fields_ = struct_fields(
        "y deltas planes plane_starts x pool row_ids seg_indptr page_table ranks a_chunks b_chunks "
        "scale_chunks bias_chunks weights projections out_features",
        "T K N G page_table_width page_elems",
        [
            (name, ctypes.c_int32)
            for name in ("num_projections", "chunk", "chunks_per_page", "is_bf16")
        ],
    )


class _AttentionArgs(ctypes.Structure):
    _fields_ = struct_fields(
        "out query kv query_indptr context_lens block_tables",
        "S block_table_width num_heads num_kv_heads head_dim page_tokens max_context "
        "query_stride window",
        [("scale", ctypes.c_float), ("is_bf16", ctypes.c_int32)],
    )


class _PackArgs(ctypes.Structure):
    _fields_ = struct_fields(
        "data modules scales ends slab pages",
        "num_modules num_layers num_pages page_elems",
        [("is_bf16", ctypes.c_int32)],
    )


class NativeKernels:
    """The compiled kernels. Tensors must be contiguous and on the CPU.

    Weights, KV and the inputs of linears are of one dtype, float32 or bfloat16; what is computed
    from them is float32.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._pack = library.loraplex_pack
        self._pack.argtypes = [ctypes.POINTER(_PackArgs)]
        self._pack.restype = None

    def call(self, name: str, *args: ctypes.Structure | int) -> None:
        """Call a function by name, structs by reference and integers as int64.

        Raises:
            MemoryError: it could not get scratch memory.
        """
        passed = [
            ctypes.c_int64(arg) if isinstance(arg, int) else ctypes.byref(arg) for arg in args
        ]
        # Not `library[name]`, which makes a new function each time, and a cycle that only the
        # collector frees: the engine runs it every few minutes.
        if getattr(self._library, name)(*passed):
            raise MemoryError(f"no memory for the scratch of {name}")

    @staticmethod
    def takes(*tensors: torch.Tensor) -> bool:
        """Whether the kernels can work on these: one dtype of theirs, contiguous."""
        dtype = tensors[0].dtype
        return dtype in _DTYPES and all(t.dtype is dtype and t.is_contiguous() for t in tensors)

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pool_layer: torch.Tensor,
        batch: LoRABatch,
        *,
        layer: int,
        projections: tuple[int, ...],
        out_features: tuple[int, ...],
    ) -> None:
        """See `reference.add_lora`; `y` is float32, `x` of the pool's dtype."""
        assert y.dtype is torch.float32
        args = _lora_args(pool_layer, batch, batch.ranks, layer, projections, out_features)
        args.x, args.K = x.data_ptr(), x.shape[1]
        _set_output(args, y, batch, layer)
        self.call("loraplex_add_lora", args)

    def shrink(
        self,
        x: torch.Tensor,
        pool_layer: torch.Tensor,
        batch: LoRABatch,
        planes: PlaneLayout,
        *,
        layer: int,
        projections: tuple[int, ...],
    ) -> torch.Tensor:
        """See `reference.shrink`; `x` is of the pool's dtype, `planes` the layout of the result."""
        ranks = batch.own_ranks
        no_outputs = (0,) * len(projections)
        args = _lora_args(pool_layer, batch, ranks, layer, projections, no_outputs)
        args.x, args.K = x.data_ptr(), x.shape[1]
        out = torch.empty(planes.num_elems, dtype=torch.float32)
        args.planes, args.plane_starts = out.data_ptr(), planes.starts.ctypes.data
        self.call("loraplex_lora_shrink", args)
        return out

    def expand(
        self,
        y: torch.Tensor,
        values: torch.Tensor,
        pool_layer: torch.Tensor,
        batch: LoRABatch,
        planes: PlaneLayout,
        *,
        layer: int,
        projections: tuple[int, ...],
        out_features: tuple[int, ...],
    ) -> None:
        """See `reference.expand`; with `shrink` before it, it gives the bits of `add_lora`.

        Args:
            y: float32; its rows may be apart.
            values: float32 `[E]`, laid out as `planes` says.
        """
        assert y.dtype is values.dtype is torch.float32
        assert y.stride(1) == 1
        assert values.numel() == planes.num_elems
        args = _lora_args(pool_layer, batch, batch.ranks, layer, projections, out_features)
        args.planes, args.plane_starts = values.data_ptr(), planes.starts.ctypes.data
        _set_output(args, y, batch, layer)
        self.call("loraplex_lora_expand", args)

    def paged_attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `reference.paged_attention`; a query's result depends on its own prefix alone.

        Args:
            query: float32 `[T, num_heads, head_dim]`.

        Returns:
            `[T, num_heads, head_dim]` in the dtype of `kv`.
        """
        assert query.dtype is torch.float32
        out = torch.empty_like(query, dtype=kv.dtype)
        args = _AttentionArgs(
            out=out.data_ptr(),
            query=query.data_ptr(),
            kv=kv.data_ptr(),
            query_indptr=batch.query_indptr.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            S=batch.context_lens.shape[0],
            block_table_width=batch.block_tables.shape[1],
            num_heads=query.shape[1],
            num_kv_heads=kv.shape[3],
            head_dim=kv.shape[4],
            page_tokens=kv.shape[2],
            max_context=batch.max_context,
            query_stride=query.shape[1] * query.shape[2],
            window=window or 0,
            scale=scale,
            is_bf16=kv.dtype is torch.bfloat16,
        )
        self.call("loraplex_attention", args)
        return out

    def pack(
        self,
        data: torch.Tensor,
        modules: torch.Tensor,
        scales: torch.Tensor,
        ends: torch.Tensor,
        slab: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        """Lay the matrices of an adapter out as pages, in one call that holds no interpreter.

        Where they lie is taken as told: bounds are the caller's affair.

        Args:
            data: uint8, what an adapter's file holds.
            modules: int64 `[M, 15]`, each `layer, rank`; then of A its dtype as an index into
                `PACKED_DTYPES`, the first byte in `data` of the part that is wanted, and its first
                element in the layer's row; the length of a row of A in `data`; rows and columns of
                the part; and those of the room for it, which is filled up with 0. Then of B
                (`[out, R]`, laid out as `[R, out]`) dtype, first byte and first element alike; the
                rows of the part, and their room.
            scales: float32 `[M]`, by which B is multiplied before it is rounded.
            ends: int64 `[L]`, the elements of each layer's row that modules cover.
            slab: `[N, L, page_elems]`, float32 or bfloat16.
            pages: int64 `[P]`, which pages of the slab a layer's row is cut into; what is behind
                its end becomes 0.
        """
        assert all(t.is_contiguous() for t in (data, modules, scales, ends, slab, pages))
        assert slab.dtype in _DTYPES
        assert modules.shape[1:] == (15,)
        args = _PackArgs(
            data=data.data_ptr(),
            modules=modules.data_ptr(),
            scales=scales.data_ptr(),
            ends=ends.data_ptr(),
            slab=slab.data_ptr(),
            pages=pages.data_ptr(),
            num_modules=modules.shape[0],
            num_layers=slab.shape[1],
            num_pages=pages.shape[0],
            page_elems=slab.shape[2],
            is_bf16=slab.dtype is torch.bfloat16,
        )
        self._pack(ctypes.byref(args))


def _lora_args(
    pool_layer: torch.Tensor,
    batch: LoRABatch,
    ranks: torch.Tensor,
    layer: int,
    projections: tuple[int, ...],
    out_features: tuple[int, ...],
) -> _LoRAArgs:
    """Return what both halves of LoRA read of one site: neither input nor output."""
    return _LoRAArgs(
        pool=pool_layer.data_ptr(),
        row_ids=batch.row_ids.data_ptr(),
        seg_indptr=batch.seg_indptr.data_ptr(),
        page_table=batch.page_table.data_ptr(),
        ranks=ranks[layer].data_ptr(),
        a_chunks=batch.a_chunks[layer].data_ptr(),
        b_chunks=batch.b_chunks[layer].data_ptr(),
        projections=ctypes.addressof(_int32s(projections)),
        out_features=ctypes.addressof(_int32s(out_features)),
        G=batch.num_segments,
        page_table_width=batch.page_table.shape[1],
        page_elems=pool_layer.shape[1],
        num_projections=len(projections),
        chunk=batch.chunk_elems,
        chunks_per_page=pool_layer.shape[1] // batch.chunk_elems,
        is_bf16=pool_layer.dtype is torch.bfloat16,
    )


def _set_output(args: _LoRAArgs, y: torch.Tensor, batch: LoRABatch, layer: int) -> None:
    """Say where the outputs are, and what is done to them besides adding the delta."""
    args.y, args.T, args.N = y.data_ptr(), y.shape[0], y.stride(0)
    args.scale_chunks = _address(batch.scale_chunks, layer)
    args.bias_chunks = _address(batch.bias_chunks, layer)
    args.weights = None if batch.weights is None else batch.weights.data_ptr()


def _address(table: torch.Tensor | None, layer: int) -> int | None:
    return None if table is None else table[layer].data_ptr()


@functools.cache
def _int32s(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int32]:
    # Kept alive by the cache: the kernels hold a bare pointer. One entry per site of a model.
    return (ctypes.c_int32 * len(values))(*values)


@functools.cache
def load_native() -> NativeKernels | None:
    """Return the compiled kernels, compiling them if need be; None when that is not possible."""
    compiler = next((c for name in ("cc", "gcc", "clang") if (c := shutil.which(name))), None)
    if compiler is None:
        log.warning("no C compiler found: LoRA and attention run on torch operations, slower")
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the CPU kernels could not be compiled, torch takes over: %s", error)
        return None


def _load(compiler: str) -> NativeKernels:
    """Load from the user's cache folder; without a home, or where it is read-only, from our own."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex"
        return NativeKernels(ctypes.CDLL(str(_compiled(compiler, cache))))
    except (OSError, RuntimeError) as error:
        log.info("no cache for the CPU kernels, they are compiled at every start: %s", error)
    # Private, so that nobody else can put a library there; a loaded one needs no file any more.
    with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
        return NativeKernels(ctypes.CDLL(str(_compiled(compiler, Path(folder)))))


def _compiled(compiler: str, cache: Path) -> Path:
    """Return the shared library, from the folder `cache` or freshly compiled into it."""
    key = hashlib.sha256()
    for path in _SOURCES + _HEADERS:
        key.update(path.read_bytes())
    key.update(repr((compiler, _FLAGS, platform.machine(), _cpu_flags())).encode())
    target = cache / f"cpu_kernels-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Two processes may compile at once; the rename makes either result whole.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / target.name
        command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.replace(target)
    return target


def _cpu_flags() -> str:
    """Return the processor's feature list: a cache shared between machines must tell them apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
