"""Adapters as PEFT trains, saves and reloads them, one case for each thing a file can say.

A case makes a PEFT model with strong random weights on a base. What it computes, saved and
reloaded on a fresh base, is what we must serve. Its naive variant is the same folder read by one
who does not know the one field or tensor: it shows that the comparison would notice.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import tiny_config, tiny_reference

VOCAB: Final = 101
SIZES: Final = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LINEARS: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Config = MutableMapping[str, Any]
Tensors = dict[str, torch.Tensor]
#: Edits a folder's configuration and tensors in place.
Naive = Callable[[Config, Tensors], None]


def make_base(family: str = "llama", **options: Any) -> Any:
    """Return a transformers model of 2 layers with random weights, the same at every call."""
    return tiny_reference(tiny_config(family, **{**SIZES, **options}))


def tied_base() -> Any:
    return make_base(tie_word_embeddings=True)


def biased_base() -> Any:
    return make_base(attention_bias=True, mlp_bias=True)


def make_prompts() -> list[list[int]]:
    """Return three prompts of different lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (17, 9, 14)]


@dataclass(frozen=True)
class PeftCase:
    """One kind of adapter.

    Attributes:
        name: unique among all cases.
        make: gets a fresh base, which it may change; returns the PEFT model as trained.
        naive: edits the saved folder as one would read it who does not know what it tells; None
            where there is nothing to overlook.
        base: makes the base model.
        save: writes the PEFT model to a folder.
        prompts: what is computed.
    """

    name: str
    make: Callable[[Any], Any]
    naive: Naive | None = None
    base: Callable[[], Any] = make_base
    save: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder)
    prompts: Callable[[], Sequence[Sequence[int]]] = make_prompts

    def __str__(self) -> str:
        return self.name

    def write(self, folder: Path) -> None:
        """Save the trained adapter to `folder`, as a user would upload it."""
        with quiet():
            self.save(self.make(self.base()), folder)

    def peft_logits(self, folder: Path) -> list[torch.Tensor]:
        """Return what PEFT computes with the folder on a fresh base, `[tokens, V]` per prompt."""
        from peft import PeftModel

        with quiet(), torch.no_grad():
            model = PeftModel.from_pretrained(self.base(), folder).eval()
            return [
                model(torch.tensor([prompt])).logits[0, -len(prompt) :] for prompt in self.prompts()
            ]

    def base_logits(self) -> list[torch.Tensor]:
        """Return what the base computes."""
        with torch.no_grad():
            model = self.base()
            return [model(torch.tensor([prompt])).logits[0] for prompt in self.prompts()]


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and transformers warn of things of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def edit_folder(folder: Path, edit: Naive) -> None:
    """Apply an edit to the files of a folder."""
    config_path = folder / "adapter_config.json"
    weights_path = folder / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    edit(config, tensors)
    config_path.write_text(json.dumps(config))
    save_file(tensors, weights_path)


def fields(**values: Any) -> Naive:
    """Return the edit that sets configuration fields."""

    def edit(config: Config, tensors: Tensors) -> None:
        config.update(values)

    return edit


def dropped(*parts: str, **values: Any) -> Naive:
    """Return the edit that drops tensors by parts of their names, and sets fields."""

    def edit(config: Config, tensors: Tensors) -> None:
        config.update(values)
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return edit


def trained(base: Any, config: Any, *, strength: float = 0.15, seed: int = 1) -> Any:
    """Return a PEFT model whose trainable parameters are far from where they started."""
    from peft import get_peft_model

    torch.manual_seed(seed)  # PEFT draws initial values from the global generator
    model = get_peft_model(base, config)
    randomise(model, strength=strength, seed=seed)
    return model


def randomise(model: Any, *, strength: float = 0.15, seed: int = 1) -> None:
    """Move every trainable parameter by random amounts that suit its kind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.4 * noise)
            elif "norm" in name or name.endswith(("bias", "lora_diag.default")):
                parameter.add_(0.5 * noise)
            else:
                parameter.add_(strength * noise)
