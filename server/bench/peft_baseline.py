"""Hugging Face PEFT's mixed batch (`adapter_names`) on the same work, in static batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from workload import Timing, Work


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time of every generated token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class PeftMixedBatch:
    """The base model with every adapter loaded; rows of one batch may use different ones."""

    def __init__(self, model: Path, adapters: Sequence[Path], dtype: torch.dtype) -> None:
        folder, extra = (model, {}) if model.is_dir() else (model.parent, {"gguf_file": model.name})
        base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **extra)
        base = base.to(dtype)
        base.generation_config.eos_token_id = None  # exact output lengths
        base.generation_config.pad_token_id = 0
        self._model = PeftModel.from_pretrained(
            base, str(adapters[0]), adapter_name="0", autocast_adapter_dtype=False
        )
        for i, folder in enumerate(adapters[1:], start=1):
            self._model.load_adapter(str(folder), adapter_name=str(i), autocast_adapter_dtype=False)
        self._model.eval()

    def run(self, work: Sequence[Work], batch_size: int) -> tuple[list[Timing], float]:
        """Generate batch after batch; return timings and wall seconds."""
        started = time.perf_counter()
        timings = []
        for at in range(0, len(work), batch_size):
            timings += self._run_batch(work[at : at + batch_size])
        return timings, time.perf_counter() - started

    @torch.inference_mode()
    def _run_batch(self, batch: Sequence[Work]) -> list[Timing]:
        width = max(len(item.prompt) for item in batch)
        ids = torch.tensor([[0] * (width - len(w.prompt)) + list(w.prompt) for w in batch])
        mask = torch.tensor([[0] * (width - len(w.prompt)) + [1] * len(w.prompt) for w in batch])
        steps = max(item.num_output for item in batch)
        clock = _Clock()
        started = time.perf_counter()
        names = ["__base__" if w.adapter is None else str(w.adapter) for w in batch]
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=names,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        times = [at - started for at in clock.times]
        return [Timing(w.num_output, tuple(times[: w.num_output])) for w in batch]
