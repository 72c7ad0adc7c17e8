"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, without spills and with wide loads.

The compiler runs in a process of its own: here `TRITON_INTERPRET=1` turns kernels into Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import loraplex_kernels
from loraplex_kernels.aot import CUT_SHAPE, MODEL_SHAPES, AotCase
from loraplex_kernels.aot_inspect import load_widths
from loraplex_memory.layout import SITES, ModelGeometry, PoolLayout
from tests.support.aot_toys import aot_cases as toy_cases

REPO = Path(__file__).parents[2]
PACKAGE = Path(loraplex_kernels.__file__).parent


def run_aot(folder: Path, *arguments: str, **env: str) -> tuple[int, list[dict], str]:
    """Run `python -m loraplex_kernels.aot` with an empty cache; status, results, output."""
    report = folder / "report.json"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "loraplex_kernels.aot", "--json", str(report), *arguments],
        cwd=REPO,
        env={**clean, "TRITON_CACHE_DIR": str(folder / "cache"), **env},
        capture_output=True,
        text=True,
    )
    results = json.loads(report.read_text()) if report.exists() else []
    return done.returncode, results, done.stdout + done.stderr


@pytest.fixture(scope="module")
def all_kernels(tmp_path_factory):
    return run_aot(tmp_path_factory.mktemp("aot"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_kernel_spills_outgrows_the_chip_or_reads_weights_narrowly(all_kernels):
    status, results, output = all_kernels
    print(output)
    bad = [
        f"{r['name']} sm_{r['capability']}: {r['violations']}" for r in results if r["violations"]
    ]
    assert not bad
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_launched_kernel_is_compiled_for_every_chip(all_kernels):
    _, results, _ = all_kernels
    sources = "\n".join(path.read_text() for path in PACKAGE.glob("*.py"))
    jitted = set(re.findall(r"@triton\.jit[^\n]*\ndef (\w+)", sources))
    launched = jitted & set(re.findall(r"(\w+)\[[^\n]*\]\(", sources))
    assert launched
    for chip in (80, 90, 100):
        compiled = {r["kernel"] for r in results if r["capability"] == chip}
        assert launched <= compiled, f"sm_{chip}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_precision_products_run_on_tensor_cores(all_kernels):
    """Operands that became float32 on the way give the same numbers, many times slower."""
    _, results, _ = all_kernels
    products = re.compile("(shrink|expand|decode_attention|prefill_attention)_kernel")
    found = [r for r in results if products.fullmatch(r["kernel"])]
    assert {r["capability"] for r in found} == {80, 90, 100}
    assert [f"{r['name']} sm_{r['capability']}" for r in found if not r["usage"]["mma"]] == []


def test_the_harness_catches_what_it_is_there_for(tmp_path):
    status, results, output = run_aot(
        tmp_path, "--module", "tests.support.aot_toys", "--capability", "90", "--jobs", "1"
    )
    found = {result["name"]: " ".join(result["violations"]) for result in results}
    assert status == 1, output
    assert found["good"] == ""
    assert "loads of pool move [2] bytes" in found["narrow"]
    assert "spills" in found["spilling"]
    assert "shared memory" in found["large"]
    assert "does not build it for sm_90" in found["not-built"]
    assert all(result["models"] == [shape.name for shape in MODEL_SHAPES] for result in results)


def test_it_refuses_to_run_where_kernels_are_interpreted(tmp_path):
    status, _, output = run_aot(
        tmp_path, "--module", "tests.support.aot_toys", TRITON_INTERPRET="1"
    )
    assert status == 2
    assert "TRITON_INTERPRET" in output


def test_the_cut_model_has_the_sizes_that_its_pool_has():
    (whole,) = (shape for shape in MODEL_SHAPES if CUT_SHAPE.name.startswith(shape.name))
    sizes = {field.name: getattr(whole, field.name) for field in fields(ModelGeometry)}
    pool = PoolLayout(ModelGeometry(**sizes), whole.page_tokens, 4)
    assert ModelGeometry(**{name: getattr(CUT_SHAPE, name) for name in sizes}) == pool.shard
    assert (CUT_SHAPE.page_elems, CUT_SHAPE.chunk_elems) == (pool.page_elems, pool.chunk_elems)
    cut = pool.partition
    assert CUT_SHAPE.sites == {
        site: (cut.inputs(names[0], 0).width, tuple(cut.outputs(n, 0).width for n in names))
        for site, names in SITES.items()
    }
    assert 4 * CUT_SHAPE.vocab_size == whole.vocab_size


def test_a_case_names_the_arguments_it_forgot():
    good = toy_cases(MODEL_SHAPES[0])[0]
    with pytest.raises(ValueError, match=r"missing \['out'\].*unknown \['outt'\]"):
        AotCase("x", good.fn, {"pool": "*bf16", "pages": "*i32", "outt": "*fp32"}, good.constexprs)


def test_loads_are_traced_through_pointer_arithmetic_to_their_argument():
    llir = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) captures(none) %1, i32 %2) {
  %4 = getelementptr [2 x i8], ptr addrspace(1) %0, i64 %9
  %5 = phi ptr addrspace(1) [ %4, %a ], [ %6, %b ]
  %6 = getelementptr i8, ptr addrspace(1) %5, i64 64
  %7 = call { i32, i32, i32, i32 } asm sideeffect "@$9 ld.global.v4.b32 { $0 }, [ $8 + 0 ];", \
"=r,l"(i32 0, ptr addrspace(1) %5, i1 %25)
  %8 = call i16 asm sideeffect "ld.global.b16 { $0 }, [ $1 + 0 ];", "=c,l"(ptr addrspace(1) %1)
  call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, 0x10;", \
"r,l"(ptr addrspace(3) %s, ptr addrspace(1) %6)
  %10 = call i32 asm "ld.global.b32 { $0 }, [ $1 + 0 ];", "=r,l"(ptr addrspace(1) %unknown)
"""
    assert load_widths(llir, ("pool", "x", "n")) == {"pool": [16, 16], "x": [2], "?": [4]}


def test_loads_are_traced_through_a_layout_change_of_their_pointers():
    llir = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) %1) {
  %3 = getelementptr [2 x i8], ptr addrspace(1) %1, i64 %9
  %4 = ptrtoint ptr addrspace(1) %3 to i64
  store <1 x i64> %4, ptr addrspace(3) %60, align 8
  %5 = load i64, ptr addrspace(3) %61, align 8
  %6 = inttoptr i64 %5 to ptr addrspace(1)
  %7 = getelementptr [2 x i8], ptr addrspace(1) %6, i64 %46
  call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;", \
"r,l,r"(ptr addrspace(3) %69, ptr addrspace(1) %7, i32 %328)
"""
    assert load_widths(llir, ("out", "pool")) == {"pool": [16]}
