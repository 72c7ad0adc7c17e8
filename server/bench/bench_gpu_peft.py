"""Hugging Face PEFT's mixed batch on the same model: decode throughput at its best batch size.

Kinder to PEFT than our own numbers are to us: prompts are computed before the clock starts, no row
is padding, and no batch waits for its longest member. One request per row, adapters in turn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from bench_gpu_models import ATTENTION, model_config


@dataclass(frozen=True)
class PeftResult:
    """Tokens per second of decoding by batch size; `best` over sizes, each the median step."""

    num_adapters: int
    tok_s: dict[int, float]

    @property
    def best(self) -> float:
        return max(self.tok_s.values())


class PeftMixedBatch:
    """A transformers model with many adapters; rows of one batch may use different ones."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, ranks: tuple[int, ...]
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = model_config(name)
        with torch.device(device):  # drawn where it is used: transformers initialises in place
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._new_config = lambda i: LoraConfig(
            r=ranks[i % len(ranks)],
            target_modules=[f"{p}_proj" for p in ATTENTION],
            init_lora_weights=False,
        )
        self._device = device
        self._vocab_size = config.vocab_size
        self._model: Any = get_peft_model(base, self._new_config(0), adapter_name="0")
        self._model.to(dtype).eval()
        self._dtype = dtype
        self._num_adapters = 1

    def add_adapters(self, num_adapters: int) -> None:
        """Add random adapters until there are so many."""
        with torch.device(self._device):
            for i in range(self._num_adapters, num_adapters):
                self._model.add_adapter(str(i), self._new_config(i))
        self._model.to(self._dtype)
        self._num_adapters = max(self._num_adapters, num_adapters)

    @torch.inference_mode()
    def decode_tok_s(self, batch: int, context: int, *, num_steps: int = 6) -> float:
        """Return tokens per second of decoding `batch` rows after `context` tokens."""
        names = [str(i % self._num_adapters) for i in range(batch)]
        ids = torch.randint(3, self._vocab_size, (batch, context), device=self._device)
        output = self._model(input_ids=ids, adapter_names=names, use_cache=True, logits_to_keep=1)
        step_s = []
        for _ in range(num_steps):
            token = output.logits[:, -1:].argmax(-1)
            self._wait()
            started = time.perf_counter()
            output = self._model(
                input_ids=token,
                past_key_values=output.past_key_values,
                adapter_names=names,
                use_cache=True,
            )
            self._wait()
            step_s.append(time.perf_counter() - started)
        return batch / sorted(step_s)[len(step_s) // 2]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
