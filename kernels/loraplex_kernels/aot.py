"""Ahead-of-time compile cases: what each Triton kernel is compiled with when no GPU is there.

Every `*_triton.py` exports `aot_cases(shape: ModelShape) -> list[AotCase]`: the variants that
serving a model of that shape launches. Equal variants of different models are compiled once.

`python -m loraplex_kernels.aot` compiles them all for sm_80, sm_90 and sm_100, prints a table of
registers, spills and shared memory, and exits 1 on a violation (`aot_build` says what one is).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from loraplex_kernels.aot_build import AotResult


@dataclass(frozen=True)
class ModelShape:
    """What of a model the compiled kernels depend on; counts of elements.

    Attributes:
        own_columns: of what several devices sum, the columns that one of them updates, while heads
            and intermediate size are those of its part; None: there is one device.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    page_tokens: int = 16
    own_columns: int | None = None

    @property
    def page_elems(self) -> int:
        """Elements of one page in one layer (DESIGN.md, "Page geometry")."""
        return 2 * self.page_tokens * self.num_kv_heads * self.head_dim

    @property
    def chunk_elems(self) -> int:
        """See `PoolLayout.chunk_elems`."""
        sizes = [size for site in self.sites.values() for size in (site[0], *site[1])]
        return math.gcd(self.page_elems, *sizes)

    @property
    def sites(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Input width and output widths of the four fused sites of a layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        own = self.own_columns or self.hidden_size
        return {
            "qkv": (self.hidden_size, (q, kv, kv)),
            "o": (q, (own,)),
            "gate_up": (self.hidden_size, (self.intermediate_size, self.intermediate_size)),
            "down": (self.intermediate_size, (own,)),
        }


MODEL_SHAPES = (
    ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
    ModelShape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936),
    ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152),
)

#: What one of four devices has of the last one, whose tiles become narrow when it is cut. The sizes
#: follow from the partition of the pool, which knows of no kernels: a test compares.
CUT_SHAPE = ModelShape("smollm2-135m, 1 of 4", 30, 576, 3, 1, 64, 384, 12288, own_columns=144)


@dataclass(frozen=True)
class AotCase:
    """One compiled variant of one kernel.

    Attributes:
        name: kernel and variant, for the table.
        fn: the `@triton.jit` function.
        signature: type of each run-time argument as Triton writes it: `*bf16`, `*fp32`, `*i32`,
            `i32`, `i64`, `fp32`. Arguments that are in `constexprs` may be left out.
        constexprs: value of each constexpr argument (also of one that Triton would specialise: an
            integer of 1, a None).
        attrs: hints by argument position, `{(i,): [["tt.divisibility", 16]]}`. By default every
            pointer is aligned to 16 bytes, as torch allocates them, and no integer is divisible.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        must_vectorise: names of the pointer arguments (the weight path: the pool) of which every
            global load must move 16 bytes per thread, or go through cp.async or TMA.
        options: further compile options, such as `{"maxnreg": 128}` or `{"launch_pdl": True}`.
        min_capability: lowest compute capability that launches this variant (90 for TMA and PDL).
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]] | None = None
    num_warps: int = 4
    num_stages: int = 3
    must_vectorise: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    min_capability: int = 80

    def __post_init__(self) -> None:
        if not isinstance(self.must_vectorise, tuple):
            raise TypeError("must_vectorise is a tuple of pointer argument names")
        known = {*self.signature, *self.constexprs}
        missing = [arg for arg in self.fn.arg_names if arg not in known]
        unknown = sorted(known.union(self.must_vectorise).difference(self.fn.arg_names))
        if missing or unknown:
            raise ValueError(f"{self.name}: arguments missing {missing}, unknown {unknown}")

    @classmethod
    def of_launch(
        cls,
        name: str,
        fn: Any,
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        types: Mapping[str, str],
        others: str = "*i32",
        weights: str | None = None,
        min_capability: int = 80,
    ) -> Self:
        """Return the variant of a launch whose pointers and row strides are multiples of 16.

        Args:
            options: compile options of the launch, `num_warps` and `num_stages` among them.
            types: of run-time arguments, by name, as `signature` has them.
            others: the type of those that `types` does not name.
            weights: the argument that must be read 16 bytes at a time, if `fn` has it.
        """
        arguments = [arg for arg in fn.arg_names if arg not in constants]
        signature = {arg: types.get(arg, others) for arg in arguments}
        hinted = [arg for arg, kind in signature.items() if kind[0] == "*" or "stride" in arg]
        own = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
        return cls(
            name,
            fn,
            signature,
            constants,
            attrs={(fn.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in hinted},
            must_vectorise=(weights,) if weights is not None and weights in arguments else (),
            options={key: value for key, value in options.items() if key not in own},
            min_capability=min_capability,
            **own,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return the exit status."""
    # Kernel files import this module for `AotCase`; what compiles them is imported only to do it.
    from loraplex_kernels import aot_build, aot_inspect

    names = [shape.name for shape in MODEL_SHAPES]
    parser = argparse.ArgumentParser(prog="python -m loraplex_kernels.aot", description=__doc__)
    parser.add_argument("--module", action="append", help="kernel module (default: all)")
    parser.add_argument(
        "--capability", type=int, nargs="+", default=[80, 90, 100], choices=[80, 90, 100]
    )
    parser.add_argument("--model", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(arguments)
    shapes = [shape for shape in MODEL_SHAPES if shape.name in args.model]
    modules = args.module or aot_build.kernel_modules()
    try:
        results = aot_build.build_all(modules, args.capability, shapes, args.jobs)
    except aot_inspect.AotToolError as error:
        sys.stderr.write(f"cannot compile kernels here: {error}\n")
        return 2
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results]))
    sys.stdout.write(_table(results) + "\n")
    return 1 if any(result.violations for result in results) else 0


def _table(results: Sequence[AotResult]) -> str:
    """One line per variant and chip; its violations follow."""
    width = max((len(result.name) for result in results), default=0)
    lines = [f"{'variant':<{width}}  chip    regs stack local  shared mma    weights  time  models"]
    for result in results:
        usage = result.usage
        shown = f"{'':>16} {result.shared_bytes:>7} {'':<7}"
        if usage is not None:
            shown = (
                f"{usage.registers:>4} {usage.stack_bytes:>5} {usage.local_bytes:>5} "
                f"{result.shared_bytes:>7} {usage.mma or '-':<7}"
            )
        lines.append(
            f"{result.name:<{width}}  sm_{result.capability:<4} {shown} "
            f"{result.weight_loads:>6} {result.compile_s:>4.1f}s  {', '.join(result.models)}"
        )
        lines += [f"    VIOLATION {text}" for text in result.violations]
    bad = sum(bool(result.violations) for result in results)
    lines.append(f"{len(results)} compiled, {bad} with violations")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
