"""What a run measured, the targets it is held to, and how both are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from bench_gpu_peft import PeftResult
from bench_gpu_serving import ServingResult
from bench_gpu_steps import StepResult
from device_limits import DeviceLimits
from lora_bench import LoRAResult
from model_bench import KernelResult

_MEGABYTE = 1e6


@dataclass
class Results:
    """Everything of one run; `notes` says what was left out and why, `failures` what broke."""

    limits: DeviceLimits | None = None
    lora: list[LoRAResult] = field(default_factory=list)
    kernels: list[KernelResult] = field(default_factory=list)
    steps: list[StepResult] = field(default_factory=list)
    serving: list[ServingResult] = field(default_factory=list)
    peft: list[PeftResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return all of it, and each target with what was measured."""
        lora = [
            {**asdict(r), "ratios": {arm: r.ratio(arm) for arm in r.us if arm != "ours"}}
            for r in self.lora
        ]
        return {
            "limits": asdict(self.limits) if self.limits else None,
            "targets": [
                {"target": t.name, "wanted": t.wanted, "measured": t.measure(self)} for t in TARGETS
            ],
            "lora": lora,
            "kernels": [asdict(r) for r in self.kernels],
            "steps": [{**asdict(r), "share_of_base": r.share_of_base} for r in self.steps],
            "serving": [asdict(r) for r in self.serving],
            "peft": [asdict(r) for r in self.peft],
            "notes": self.notes,
            "failures": self.failures,
        }


@dataclass(frozen=True)
class Target:
    """A ratio to reach; `measure` returns None where the run did not get to it."""

    name: str
    wanted: float
    measure: Callable[[Results], float | None]

    def line(self, results: Results) -> str:
        """One line of the table."""
        measured = self.measure(results)
        if measured is None:
            return f"  {self.name:<66} >= {self.wanted:<5} not measured"
        verdict = "met" if measured >= self.wanted else "NOT MET"
        return f"  {self.name:<66} >= {self.wanted:<5} {measured:>7.3f}  {verdict}"


def _least_share(low: float, high: float) -> Callable[[Results], float | None]:
    """The smallest bandwidth share of sites that move `[low, high)` bytes."""

    def measure(results: Results) -> float | None:
        return _least(r.bandwidth_share for r in results.lora if low <= r.true_bytes < high)

    return measure


def _least_ratio(arm: str, *parts: str) -> Callable[[Results], float | None]:
    """The smallest advantage over `arm` among cases whose names contain all parts."""

    def measure(results: Results) -> float | None:
        found = [r for r in results.lora if all(part in r.case for part in parts)]
        return _least(ratio for r in found if (ratio := r.ratio(arm)) is not None)

    return measure


def _step_share(batch: int, arm: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        found = [r for r in results.steps if r.batch == batch and "llama-3-8b" in r.case]
        return _least(r.share_of_base[arm] for r in found)

    return measure


def _retention(results: Results) -> float | None:
    one, many = (_throughput(results, f"S1, {n}") for n in (1, 2000))
    return many / one if one and many else None


def _over_peft(num_adapters: int) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        peft = max((r.best for r in results.peft if r.num_adapters == num_adapters), default=None)
        ours = _throughput(results, f"S1, {num_adapters}")
        return ours / peft if peft and ours else None

    return measure


def _throughput(results: Results, arm: str) -> float | None:
    return max((r.out_tok_s for r in results.serving if r.arm == arm), default=None)


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


#: Issue 3, "Where a GPU is at hand, what it must reach".
TARGETS = (
    Target(
        "LoRA site of 16 MB and more: share of copy bandwidth",
        0.6,
        _least_share(16 * _MEGABYTE, 64 * _MEGABYTE),
    ),
    Target(
        "LoRA site of 64 MB and more: share of copy bandwidth",
        0.75,
        _least_share(64 * _MEGABYTE, float("inf")),
    ),
    Target(
        "over padded slots, S2 mix, 64 distinct (worst site)",
        1.8,
        _least_ratio("padded slots", "64 adapters 64 rows", "ranks S2"),
    ),
    Target(
        "over per-token BGMV, 64 rows on 4 adapters (worst mix)",
        3.0,
        _least_ratio("per-token BGMV", " 4 adapters 64 rows"),
    ),
    *(
        Target(
            f"decode, 1 adapter on {targets}, batch {batch}: share of base",
            wanted,
            _step_share(batch, f"1 adapter, {targets}"),
        )
        for targets in ("q k v o", "all linears")
        for batch, wanted in ((64, 0.95), (1, 0.88))
    ),
    Target("2000 adapters over 1 adapter, S1, tokens per second", 0.93, _retention),
    Target("over PEFT at its best batch, 5 adapters", 15.0, _over_peft(5)),
    Target("over PEFT at its best batch, 100 adapters", 40.0, _over_peft(100)),
)


def targets_table(results: Results) -> str:
    """Each target, what was measured, and whether it was met."""
    return "\n".join(["targets", *(target.line(results) for target in TARGETS)])


def limits_table(limits: DeviceLimits) -> str:
    """The ceilings of this run."""
    return (
        f"copy {limits.copy_gb_s:.0f} GB/s, bfloat16 GEMM {limits.gemm_tflop_s:.0f} TFLOP/s, "
        f"graph node {limits.node_us:.2f} us (1056 programs: {limits.wide_node_us:.2f} us)"
    )


LORA_HEADER = (
    f"{'LoRA site':<62} {'MB':>6} {'us':>8} {'GB/s':>6} {'share':>6}   times ours: "
    "padded / BGMV / loop / bmm"
)


def lora_line(r: LoRAResult) -> str:
    """One case: our time and bandwidth, and how much longer the others take."""
    arms = ("padded slots", "per-token BGMV", "adapter loop", "gather+bmm")
    ratios = " / ".join(f"{v:.2f}" if (v := r.ratio(arm)) is not None else "-" for arm in arms)
    return (
        f"{r.case:<62} {r.true_bytes / _MEGABYTE:>6.1f} {r.us['ours']:>8.2f} {r.gb_s:>6.0f} "
        f"{r.bandwidth_share:>6.2f}   {ratios}"
    )


def kernel_line(r: KernelResult) -> str:
    """One launch and its share of what bounds it."""
    ceiling = "copy bandwidth" if r.bound == "bytes" else "GEMM rate"
    return f"{r.case:<62} {r.us:>8.2f} us  {r.share:>5.2f} of {ceiling}"


def step_lines(r: StepResult) -> str:
    """One comparison, an arm per line."""
    arms = [
        f"    {arm:<26} {ms:>8.3f} ms  {r.share_of_base[arm]:>6.3f}" for arm, ms in r.ms.items()
    ]
    return "\n".join([f"{r.case} (share of base)", *arms])


def serving_line(r: ServingResult) -> str:
    """One arm of the closed loop."""
    return (
        f"{r.arm:<12} {r.out_tok_s:>8.0f} tok/s {r.req_s:>7.2f} req/s  "
        f"ttft {r.ttft_p50_ms:>7.0f} ms  gap {r.gap_p50_ms:>6.1f} ms  loads {r.num_loads:>5} "
        f"evictions {r.num_evictions:>5}  preemptions {r.num_preemptions:>3}"
    )


def peft_line(r: PeftResult) -> str:
    """PEFT's decoding rate by batch size."""
    sizes = ", ".join(f"batch {batch}: {tok_s:.0f}" for batch, tok_s in r.tok_s.items())
    return f"PEFT, {r.num_adapters} adapters: {sizes} tok/s"
