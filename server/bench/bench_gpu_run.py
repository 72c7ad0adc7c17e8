"""The sections of `bench_gpu`, in order, each within its share of the time."""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bench_gpu_engine import Engine, make_engine
from bench_gpu_models import model_spec, write_adapters
from bench_gpu_peft import PeftMixedBatch, PeftResult
from bench_gpu_report import (
    LORA_HEADER,
    Results,
    kernel_line,
    limits_table,
    lora_line,
    peft_line,
    serving_line,
    step_lines,
)
from bench_gpu_serving import ClosedLoop, Lengths
from bench_gpu_steps import StepBench
from device_clock import DeviceClock
from device_limits import DeviceLimits, measure_limits
from lora_bench import RANK_MIXES, LoRABench, LoRACase, bandwidth_cases, sharing_cases
from model_bench import KernelBench, KernelResult

#: By when each section must be done, as a share of the time.
_SHARES = {"limits": 0.06, "kernels": 0.40, "steps": 0.58, "serving": 1.0}

_BASELINES = ("padded slots", "per-token BGMV")
_ALL_BASELINES = ("padded slots", "per-token BGMV", "adapter loop", "gather+bmm")


@dataclass(frozen=True)
class Budget:
    """Seconds on the clock of `time.monotonic`."""

    started: float
    seconds: float

    def is_spent(self, section: str, reserve_s: float = 0.0) -> bool:
        """Whether a section must not start anything that takes `reserve_s`."""
        return time.monotonic() + reserve_s > self.started + self.seconds * _SHARES[section]


class Bench:
    """Runs the sections in order and collects what they measure."""

    def __init__(self, device: torch.device, budget: Budget, *, is_dry: bool) -> None:
        self._device = device
        self._budget = budget
        self._is_dry = is_dry
        self._dtype = torch.bfloat16
        self._clock = DeviceClock(device)
        self.results = Results()

    def run(self, sections: list[str]) -> None:
        """Run sections; limits are measured in any case."""
        self._limits()
        for name, section in (
            ("kernels", self._kernels),
            ("steps", self._steps),
            ("serving", self._serving),
        ):
            if name in sections:
                self._try(name, section)

    def _try(self, label: str, work: Callable[[], None]) -> None:
        """Do some work; what goes wrong is noted, and must not cost what comes after it."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  the top frame of this part of the run
            self.results.failures.append(f"{label}: {type(error).__name__}: {error}")
            print(f"FAILED {label}", flush=True)
            traceback.print_exc()
        self._release()

    def _limits(self) -> None:
        self.results.limits = measure_limits(self._clock)
        print(limits_table(self.results.limits), flush=True)

    def _kernels(self) -> None:
        limits = self.results.limits
        assert limits is not None
        print("\n" + LORA_HEADER, flush=True)
        cases = list(self._lora_cases())
        for index, (case, baselines) in enumerate(cases):
            if self._budget.is_spent("kernels", reserve_s=8):
                self._note(f"{len(cases) - index} of {len(cases)} LoRA cases: out of time")
                break
            self._try(case.name, partial(self._lora_case, case, baselines, limits))
        self._model_kernels()

    def _lora_case(self, case: LoRACase, baselines: tuple[str, ...], limits: DeviceLimits) -> None:
        result = LoRABench(case, self._clock, self._dtype).run(limits, baselines)
        self.results.lora.append(result)
        print(lora_line(result), flush=True)

    def _model_kernels(self) -> None:
        limits = self.results.limits
        assert limits is not None
        name = "tiny" if self._is_dry else "llama-3-8b"
        bench = KernelBench(name, model_spec(name).geometry, self._clock, self._dtype)
        contexts = (40,) if self._is_dry else (512, 4096)
        batches = (1, 2) if self._is_dry else (1, 64, 256)
        print()
        work: list[Callable[[], Iterable[KernelResult]]] = [
            partial(bench.decode_attention, limits, batch, context)
            for context in contexts
            for batch in batches
        ]
        work.append(partial(bench.prefill_attention, limits, 40 if self._is_dry else 4096))
        num_tokens = (3,) if self._is_dry else (256, 8192)
        work += [partial(bench.elementwise, limits, count) for count in num_tokens]
        for index, measure in enumerate(work):
            if self._budget.is_spent("kernels"):
                self._note(f"{len(work) - index} of {len(work)} other kernels: out of time")
                return
            self._try("a kernel", partial(self._add_kernels, measure))

    def _add_kernels(self, measure: Callable[[], Iterable[KernelResult]]) -> None:
        for result in measure():
            self.results.kernels.append(result)
            print(kernel_line(result), flush=True)

    def _lora_cases(self) -> Iterator[tuple[LoRACase, tuple[str, ...]]]:
        """Yield the cases, those that targets are about first."""
        if self._is_dry:
            tiny = model_spec("tiny").geometry
            yield LoRACase("tiny", tiny, "qkv", 2, 3, "16"), _ALL_BASELINES
            return
        llama3, llama2 = (model_spec(n).geometry for n in ("llama-3-8b", "llama-2-7b"))
        sharing = list(sharing_cases("llama-3-8b", llama3))
        bandwidth = list(bandwidth_cases("llama-3-8b", llama3, 64))
        for case in (*bandwidth[:4], *sharing[:1]):
            yield case, _ALL_BASELINES
        for case in sharing:
            if case.num_rows == 64 and case.num_adapters == 4 and case != sharing[0]:
                yield case, _ALL_BASELINES
        for case in (*bandwidth[4:], *sharing[1:]):
            if (case.num_rows, case.num_adapters, case.mix) != (64, 4, "16"):
                yield case, _BASELINES
        for mix in ("S1", "S2"):
            for site in ("qkv", "o"):
                yield LoRACase("llama-2-7b", llama2, site, 64, 64, mix), _BASELINES
        smollm2 = model_spec("smollm2-135m").geometry
        for site in ("qkv", "down"):
            yield LoRACase("smollm2-135m", smollm2, site, 64, 64, "S2"), _BASELINES

    def _steps(self) -> None:
        names = ("tiny",) if self._is_dry else ("llama-3-8b", "smollm2-135m")
        for name in names:
            if self._budget.is_spent("steps", reserve_s=20):
                self._note(f"decode steps of {name}: out of time")
                continue
            self._try(f"decode steps of {name}", partial(self._with_engine, name, self._step_bench))

    def _step_bench(self, engine: Engine) -> None:
        bench = StepBench(engine.name, engine.runner, engine.pool, rank=4 if self._is_dry else 16)
        batches = (2,) if self._is_dry else (1, 64, 8, 256)
        context = 40 if self._is_dry else 512
        num_steps, rounds = (2, 1) if self._is_dry else (16, 5)
        for batch in batches:
            if self._budget.is_spent("steps", reserve_s=5):
                self._note(f"decode steps of {engine.name} at batch {batch}: out of time")
            elif not bench.fits(batch, context, num_steps):
                self._note(f"decode steps of {engine.name} at batch {batch}: the pool is too small")
            else:
                result = bench.compare(batch, context=context, num_steps=num_steps, rounds=rounds)
                self.results.steps.append(result)
                print(step_lines(result), flush=True)

    def _serving(self) -> None:
        name = "tiny" if self._is_dry else "llama-2-7b"
        with tempfile.TemporaryDirectory() as folder:
            work = partial(self._closed_loops, Path(folder))
            self._try("closed loop", partial(self._with_engine, name, work))
        self._peft(name)

    def _closed_loops(self, folder: Path, engine: Engine) -> None:
        counts = (1, 3) if self._is_dry else (1, 2000, 5, 100, 1000)
        geometry = engine.model.spec.geometry
        lengths = Lengths((4, 8), (2, 4)) if self._is_dry else Lengths()
        loop = ClosedLoop(
            engine.core,
            engine.model.spec.vocab_size,
            concurrency=2 if self._is_dry else 256,
            lengths=lengths,
        )
        ramp_s, window_s = (0.1, 0.1) if self._is_dry else (8.0, 8.0)
        arms = [
            ("base", "S1", 0),
            *((f"{mix}, {n}", mix, n) for mix in ("S1", "S2") for n in counts),
        ]
        for arm, mix, count in arms:
            # What PEFT needs is kept back.
            if self._budget.is_spent("serving", reserve_s=ramp_s + window_s + 45):
                self._note(f"closed loop, {arm} adapters: out of time")
                continue
            ranks = (8, 4) if self._is_dry else RANK_MIXES[mix]
            adapters = write_adapters(folder, geometry, ranks, count, prefix=arm)
            result = loop.run(arm, adapters, ramp_s=ramp_s, window_s=window_s)
            self.results.serving.append(result)
            print(serving_line(result), flush=True)

    def _peft(self, name: str) -> None:
        try:
            peft = PeftMixedBatch(name, self._device, self._dtype, (8,))
        except ImportError as error:
            self._note(f"PEFT: not importable here ({error})")
            return
        counts, batches = ((2,), (2,)) if self._is_dry else ((5, 100), (64, 256, 16))
        for count in counts:
            if self._budget.is_spent("serving", reserve_s=15):
                self._note(f"PEFT, {count} adapters: out of time")
                continue
            peft.add_adapters(count)
            tok_s: dict[int, float] = {}
            for batch in batches:
                if not tok_s or not self._budget.is_spent("serving", reserve_s=10):
                    tok_s[batch] = peft.decode_tok_s(batch, 16 if self._is_dry else 260)
            result = PeftResult(count, tok_s)
            self.results.peft.append(result)
            print(peft_line(result), flush=True)

    def _with_engine(self, name: str, work: Callable[[Engine], None]) -> None:
        """Build an engine, work with it, and let go of its memory: the next one takes all."""
        started = time.monotonic()
        engine = make_engine(name, self._device, self._dtype)
        print(f"\n{name}: engine built in {time.monotonic() - started:.0f} s\n", flush=True)
        try:
            work(engine)
        finally:
            engine.core.close()

    def _note(self, text: str) -> None:
        self.results.notes.append(text)
        print(f"left out: {text}", flush=True)

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
