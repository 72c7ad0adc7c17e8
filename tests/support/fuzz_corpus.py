"""Whole adapters that fuzzing damages: one of every kind that is read, as bytes and as values."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loraplex_server.adapters.formats.linears import PREFIX
from loraplex_server.adapters.formats.registry import REFUSED
from tests.support.peft_cases import SIZES, make_base
from tests.support.peft_cases_other import CASES
from tests.support.peft_lora_cases import LORA_CASES


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as a safetensors file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class SeedAdapter:
    """A whole adapter.

    Attributes:
        base: key into `Corpus.bases`.
        config: `adapter_config.json`.
        tensors: by name.
    """

    name: str
    base: str
    config: Mapping[str, Any]
    tensors: Mapping[str, HeaderEntry]


@dataclass(frozen=True)
class Corpus:
    """All adapters, and the transformers models that they belong to."""

    seeds: tuple[SeedAdapter, ...]
    bases: Mapping[str, Any]


def make_corpus() -> Corpus:
    """Make every case that tests compare with PEFT, and the kinds that PEFT does not have."""
    seeds, bases = [], {}
    for case in (*CASES.values(), *LORA_CASES):
        key = case.base.__name__
        bases.setdefault(key, case.base())
        with tempfile.TemporaryDirectory() as folder:
            case.write(Path(folder))
            seeds.append(_read(case.name, key, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        bases.setdefault("make_base", make_base())
        for kind, make in _NOT_IN_PEFT.items():
            save_file(make(), Path(folder, "adapter_model.safetensors"))
            config = {"peft_type": kind, **_OWN_FIELDS[kind]}
            Path(folder, "adapter_config.json").write_text(json.dumps(config))
            seeds.append(_read(kind.lower(), "make_base", Path(folder)))
    seeds += [_refused(kind, seeds[0]) for kind in sorted(REFUSED)]
    return Corpus(tuple(seeds), bases)


def _read(name: str, base: str, folder: Path) -> SeedAdapter:
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    content = Path(folder, "adapter_model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    tensors = {
        key: HeaderEntry(
            entry["dtype"],
            tuple(entry["shape"]),
            content[end + entry["data_offsets"][0] : end + entry["data_offsets"][1]],
        )
        for key, entry in json.loads(content[8:end]).items()
        if key != "__metadata__"
    }
    return SeedAdapter(name, base, config, tensors)


def _refused(kind: str, like: SeedAdapter) -> SeedAdapter:
    return SeedAdapter(kind.lower(), like.base, {**like.config, "peft_type": kind}, like.tensors)


_HIDDEN = SIZES["hidden_size"]
_OWN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "BONE": {"r": 8, "target_modules": ["q_proj"]},
    "PACA": {"r": 4, "paca_alpha": 8, "target_modules": ["q_proj"]},
    "SSF": {"target_modules": ["q_proj"]},
}


def _of_queries(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stem = f"{PREFIX}model.layers.{{}}.self_attn.q_proj"
    return {
        f"{stem.format(layer)}.{suffix}": tensor.clone()
        for layer in range(SIZES["num_hidden_layers"])
        for suffix, tensor in tensors.items()
    }


_NOT_IN_PEFT: Mapping[str, Callable[[], dict[str, torch.Tensor]]] = {
    "BONE": lambda: _of_queries({"bone_block": torch.ones(8, _HIDDEN)}),
    "PACA": lambda: _of_queries(
        {"paca_w": torch.ones(_HIDDEN, 4), "paca_indices": torch.tensor([5, 1, 9, 60])}
    ),
    "SSF": lambda: _of_queries(
        {"ssf_scale": torch.full((_HIDDEN,), 0.5), "ssf_shift": torch.ones(_HIDDEN)}
    ),
}
