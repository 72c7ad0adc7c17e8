"""How a case of an adapter other than LoRA is made, and misread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch

from loraplex_memory.adapter_spec import HEAD_ROWS
from loraplex_memory.adapter_weights import AdapterWeights
from tests.support.peft_cases import (
    Config,
    Naive,
    PeftCase,
    Tensors,
    edit_folder,
    fields,
    make_base,
    quiet,
)

#: What a naive reader would have made of what was read; its second argument is the base.
Misread = Callable[[AdapterWeights, Any], AdapterWeights]


@dataclass(frozen=True)
class OtherCase(PeftCase):
    """A case whose artifact may hold several tasks.

    Attributes:
        config: makes the configuration, without its task type.
        misread: the naive reading where no edit of the folder shows it.
        task_id: what PEFT's forward takes; an uploader says it in the configuration.
    """

    config: Callable[[], peft.PeftConfig] = peft.LoraConfig
    misread: Misread | None = None
    task_id: int | None = None

    def write(self, folder: Path) -> None:
        super().write(folder)
        if self.task_id is not None:
            edit_folder(folder, fields(loraplex_task=self.task_id))

    def peft_logits(self, folder: Path) -> list[torch.Tensor]:
        if self.task_id is None:
            return super().peft_logits(folder)
        with quiet(), torch.no_grad():
            model = peft.PeftModel.from_pretrained(self.base(), folder).eval()
            task_ids = torch.tensor([self.task_id])
            return [
                model(torch.tensor([prompt]), task_ids=task_ids).logits[0, -len(prompt) :]
                for prompt in self.prompts()
            ]


def case(
    config: Callable[[], peft.PeftConfig],
    naive: Naive | None = None,
    *,
    base: Callable[[], Any] = make_base,
    strength: Mapping[str, float] = MappingProxyType({"": 0.15}),
    prepare: Callable[[Any], None] | None = None,
    misread: Misread | None = None,
    task_id: int | None = None,
) -> Callable[[str], OtherCase]:
    """Return a case without its name.

    Args:
        config: makes the configuration, without its task type.
        strength: of the random parameters, by a part of their names; `""` for all others.
        prepare: changes PEFT's model before it is saved.
    """

    def make(model: Any) -> Any:
        chosen = config()
        chosen.task_type = "CAUSAL_LM"
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, chosen)
        _replace_parameters(tuned, strength)
        if prepare is not None:
            prepare(tuned)
        return tuned

    return lambda name: OtherCase(
        name, make, naive, base, config=config, misread=misread, task_id=task_id
    )


def _replace_parameters(model: Any, strength: Mapping[str, float]) -> None:
    """Replace every trainable parameter, or scale it at random where it is a factor itself."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = next((s for part, s in strength.items() if part and part in name), strength[""])
        noise = own * torch.randn(parameter.shape, generator=generator)
        is_factor = "ia3_l" in name or "ln_tuning" in name
        parameter.data.copy_(1.0 + noise if is_factor else noise)


def tensors(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Naive:
    """Return the change of all tensors with `part` in their names."""

    def apply(_: Config, found: Tensors) -> None:
        names = [name for name in found if part in name]
        assert names
        for name in names:
            found[name] = change(found[name]).contiguous()

    return apply


def drop_part(name: str) -> Misread:
    """Return the misreading without one part."""

    def drop(weights: AdapterWeights, _: Any) -> AdapterWeights:
        parts = {key: part for key, part in weights.parts.items() if key[0] != name}
        assert len(parts) < len(weights.parts)
        lost = {"head_token_ids": ()} if name == HEAD_ROWS else {}
        return replace(weights, parts=parts, **lost)

    return drop


def nothing(_: AdapterWeights, __: Any) -> AdapterWeights:
    """The misreading that answers as the base."""
    return AdapterWeights()


def fused_base() -> Any:
    return make_base("phi3")
