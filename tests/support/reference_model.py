"""transformers + PEFT as the judge of our tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex_server.model.source import ModelSource

#: A divergence is excused where the reference's two best logits lie this close together.
TIE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """How one generated sequence compares with the reference's greedy choice at every position."""

    num_tokens: int
    num_excused: int
    wrong_at: int | None


class ReferenceModel:
    """The default model in float32 with every adapter loaded by PEFT."""

    def __init__(self, source: ModelSource, adapters: Mapping[str, Path]) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            str(source.path.parent), gguf_file=source.path.name, dtype=torch.float32
        )
        self._base = copy.deepcopy(base)
        first, *others = adapters
        self._model = PeftModel.from_pretrained(base, str(adapters[first]), adapter_name=first)
        for name in others:
            self._model.load_adapter(str(adapters[name]), adapter_name=name)
        self._model.eval()

    def fresh_base(self) -> Any:
        """Return a base model of transformers' that nobody else has."""
        return copy.deepcopy(self._base)

    @torch.inference_mode()
    def judge(self, adapter: str | None, prompt: Sequence[int], output: Sequence[int]) -> Verdict:
        """Check that each output token is the reference's best one after those before it.

        One forward pass over prompt and output decides for all positions at once: a sequence in
        which every token is the argmax given its own prefix is the greedy one.
        """
        ids = torch.tensor([[*prompt, *output]])
        if adapter is None:
            with self._model.disable_adapter():
                logits = self._model(input_ids=ids).logits[0]
        else:
            self._model.set_adapter(adapter)
            logits = self._model(input_ids=ids).logits[0]
        num_excused = 0
        for i, token in enumerate(output):
            values, best = logits[len(prompt) + i - 1].topk(2)
            if token == int(best[0]):
                continue
            if token == int(best[1]) and float(values[0] - values[1]) < TIE:
                num_excused += 1
                continue
            return Verdict(len(output), num_excused, i)
        return Verdict(len(output), num_excused, None)
