"""Compiles every kernel variant for every chip, with no GPU, and judges what came out.

A variant that would not build, that spills registers to local memory, that asks for more shared
memory than the chip has, or that reads adapter weights in pieces narrower than 16 bytes is a
violation: on a card it would be a crash at the first request, or a kernel several times slower.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex_kernels.aot import MODEL_SHAPES, AotCase, ModelShape
from loraplex_kernels.aot_inspect import (
    WIDE_BYTES,
    AotToolError,
    CubinUsage,
    cuobjdump_path,
    load_widths,
    read_usage,
)

CAPABILITIES = (80, 90, 100)

#: Shared memory one program may use, in bytes (CUDA C++ Programming Guide, "Technical
#: Specifications per Compute Capability"), with the 1 KB that chips from 9.0 reserve left out.
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_RESERVED_SHARED_BYTES = {80: 0, 90: 1024, 100: 1024}


@dataclass(frozen=True)
class Variant:
    """A case and the models that launch it."""

    case: AotCase
    models: tuple[str, ...]


@dataclass(frozen=True)
class AotResult:
    """What one variant became on one chip; `violations` is empty where all is well."""

    name: str
    kernel: str
    models: tuple[str, ...]
    capability: int
    compile_s: float
    usage: CubinUsage | None
    shared_bytes: int
    weight_loads: str
    violations: tuple[str, ...]


def kernel_modules() -> list[str]:
    """Return the modules of this package that hold Triton kernels."""
    folder = Path(__file__).parent
    return [f"loraplex_kernels.{path.stem}" for path in sorted(folder.glob("*_triton.py"))]


def collect_variants(
    modules: Sequence[str], shapes: Iterable[ModelShape] = MODEL_SHAPES
) -> list[Variant]:
    """Return the distinct variants of all modules and models, in a fixed order."""
    cases: dict[str, tuple[AotCase, list[str]]] = {}
    loaded = [importlib.import_module(name) for name in modules]
    for shape in shapes:
        for module in loaded:
            for case in module.aot_cases(shape):
                models = cases.setdefault(_identity(case), (case, []))[1]
                if shape.name not in models:
                    models.append(shape.name)
    return [Variant(case, tuple(models)) for case, models in cases.values()]


def _identity(case: AotCase) -> str:
    """What the compiler sees of a case; the name is for people."""
    return repr(
        (
            case.fn.__module__,
            case.fn.__name__,
            sorted(case.signature.items()),
            sorted(case.constexprs.items()),
            sorted((case.attrs or {}).items()),
            (case.num_warps, case.num_stages, case.min_capability),
            sorted(case.options.items()),
            case.must_vectorise,
        )
    )


def compile_variant(variant: Variant, capability: int) -> AotResult:
    """Compile one variant for one chip and judge it."""
    case, started = variant.case, time.perf_counter()
    try:
        kernel = triton.compile(
            _source(case),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": case.num_warps,
                "num_stages": case.num_stages,
                "enable_fp_fusion": True,
                **case.options,
            },
        )
    except Exception as error:  # noqa: BLE001  the compiler raises many types; each is a finding
        return _result(variant, capability, started, None, 0, "-", [_not_built(capability, error)])
    usage = read_usage(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    shared += max(0, usage.shared_bytes - _RESERVED_SHARED_BYTES[capability])
    arguments = tuple(arg for arg in case.fn.arg_names if arg not in case.constexprs)
    widths = load_widths(kernel.asm["llir"], arguments)
    found = list(_violations(case, capability, usage, shared, widths))
    loads = _weight_loads(case, widths)
    return _result(variant, capability, started, usage, shared, loads, found)


def _source(case: AotCase) -> ASTSource:
    names = case.fn.arg_names
    signature = {
        name: "constexpr" if name in case.constexprs else case.signature[name] for name in names
    }
    attrs = case.attrs
    if attrs is None:
        pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
        attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return ASTSource(case.fn, signature, dict(case.constexprs), attrs)


def _result(
    variant: Variant,
    capability: int,
    started: float,
    usage: CubinUsage | None,
    shared_bytes: int,
    weight_loads: str,
    violations: list[str],
) -> AotResult:
    return AotResult(
        variant.case.name,
        variant.case.fn.__name__,
        variant.models,
        capability,
        time.perf_counter() - started,
        usage,
        shared_bytes,
        weight_loads,
        tuple(violations),
    )


def _weight_loads(case: AotCase, widths: dict[str, list[int]]) -> str:
    """Say for the table how the weight path is read: the narrowest load in bytes, or TMA."""
    found = [width for argument in case.must_vectorise for width in widths.get(argument, [])]
    if not found:
        return "tma" if case.must_vectorise and "tma" in widths else "-"
    return f"{min(found)} B"


def _not_built(capability: int, error: Exception) -> str:
    # The compiler's message shows the source with a caret and may leave the reason to its cause.
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    reason = lines[-1] if lines else repr(error)
    if error.__cause__ is not None:
        reason = f"{reason} ({error.__cause__})"
    return f"triton {triton.__version__} does not build it for sm_{capability}: {reason}"


def _violations(
    case: AotCase,
    capability: int,
    usage: CubinUsage,
    shared_bytes: int,
    widths: dict[str, list[int]],
) -> Iterable[str]:
    if usage.local_bytes or usage.stack_bytes or usage.spill_instructions:
        yield (
            f"spills: {usage.stack_bytes} bytes of stack, {usage.local_bytes} of local memory, "
            f"{usage.spill_instructions} LDL/STL at {usage.registers} registers"
        )
    limit = SHARED_LIMIT_BYTES[capability]
    if shared_bytes > limit:
        yield f"shared memory: {shared_bytes} bytes, sm_{capability} has {limit}"
    for argument in case.must_vectorise:
        loads = widths.get(argument, [])
        narrow = sorted({width for width in loads if width < WIDE_BYTES})
        if narrow:
            count = sum(width < WIDE_BYTES for width in loads)
            yield f"weight path: {count} of {len(loads)} loads of {argument} move {narrow} bytes"
        elif not loads and "tma" not in widths:
            yield f"weight path: no load of {argument} was found"
    if case.must_vectorise and "?" in widths:
        yield f"weight path: {len(widths['?'])} loads whose argument is not known"


def build_all(
    modules: Sequence[str], capabilities: Sequence[int], shapes: Sequence[ModelShape], jobs: int
) -> list[AotResult]:
    """Compile every distinct variant for every chip that launches it, in `jobs` processes.

    Raises:
        AotToolError: where triton cannot compile or inspect at all.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise AotToolError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    cuobjdump_path()
    variants = _variants(tuple(modules), tuple(shapes))
    work = [
        (tuple(modules), tuple(shapes), index, capability)
        for index, variant in enumerate(variants)
        for capability in capabilities
        if capability >= variant.case.min_capability
    ]
    if jobs == 1:
        return [_compile_index(*item) for item in work]
    # JIT functions do not pickle: each process imports the kernels and is sent indices.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_index, *zip(*work, strict=True)))


@functools.cache
def _variants(modules: tuple[str, ...], shapes: tuple[ModelShape, ...]) -> list[Variant]:
    return collect_variants(modules, shapes)


def _compile_index(
    modules: tuple[str, ...], shapes: tuple[ModelShape, ...], index: int, capability: int
) -> AotResult:
    return compile_variant(_variants(modules, shapes)[index], capability)
