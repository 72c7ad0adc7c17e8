"""Adapters for tests: real ones saved by PEFT on a tiny random model, and hand-made folders.

The real ones are what a user would upload; the hand-made ones are quick, and can be wrong in ways
that PEFT does not write.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_server.adapters.base_model import BaseModel, StateDict
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.reader import ReadAdapter
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.storage_places import StoragePlaces
from loraplex_server.model.spec import ModelSpec

BASE_NAME = "tiny-llama"

TINY = ModelGeometry(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
)

#: `module -> projection` of one tiny layer, and the module's path inside it.
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

_SIZES = {
    "hidden_size": TINY.hidden_size,
    "intermediate_size": TINY.intermediate_size,
    "num_hidden_layers": TINY.num_layers,
    "num_attention_heads": TINY.num_heads,
    "num_key_value_heads": TINY.num_kv_heads,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_tiny_base(family: str = "llama", *, seed: int = 0) -> torch.nn.Module:
    """Return a random causal language model of `TINY`'s sizes; `family` is llama or phi3."""
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**_SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def save_peft_adapter(
    folder: Path,
    config: Any,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Save an adapter of random weights as PEFT does.

    Args:
        config: a PEFT configuration (`LoraConfig(...)`).
        dtype: what the saved tensors are cast to.

    Returns:
        What PEFT adds to each weight of the base when it merges the reloaded adapter, by name.
    """
    from peft import PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers deprecate things of their own
        model = get_peft_model(make_tiny_base(family), config)
        torch.manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        if dtype != torch.float32:
            cast_weights(folder, dtype)
        base = make_tiny_base(family)
        before = {name: weight.clone() for name, weight in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    return {name: merged[name] - weight for name, weight in before.items()}


def cast_weights(folder: Path, dtype: torch.dtype) -> None:
    """Save the folder's tensors again as `dtype`."""
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)


def make_tensors(
    ranks: Mapping[str, int] | None = None,
    *,
    num_layers: int = TINY.num_layers,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Return tensors named as PEFT names them; `ranks` by projection, q and v of 4 by default."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(num_layers):
        for projection, rank in (ranks or {"q": 4, "v": 4}).items():
            stem = f"base_model.model.model.layers.{layer}.{LINEARS[projection]}"
            a = torch.randn(rank, TINY.in_features(projection), generator=generator)
            b = torch.randn(TINY.out_features(projection), rank, generator=generator)
            tensors[f"{stem}.lora_A.weight"] = a.to(dtype)
            tensors[f"{stem}.lora_B.weight"] = b.to(dtype)
    return tensors


def make_config(**fields: Any) -> dict[str, Any]:
    """Return a minimal LoRA configuration of rank 4, with `fields` over it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [path.split(".")[1] for path in LINEARS.values()],
        **fields,
    }


def make_folder(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> Path:
    """Write a PEFT folder by hand and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config or make_config()))
    save_file(
        dict(tensors if tensors is not None else make_tensors(seed=seed)),
        folder / "adapter_model.safetensors",
    )
    return folder


def read_folder(
    folder: Path,
    *,
    base_names: tuple[str, ...] = (BASE_NAME,),
    check_base: bool = True,
    limits: AdapterLimits | None = None,
    reference: torch.nn.Module | None = None,
) -> ReadAdapter:
    """Read a folder for a base: by default for `make_tiny_base()`."""
    base = tiny_base_model() if reference is None else base_model_of(reference)
    return FolderReader(base, base_names, limits).read(folder, check_base=check_base)


def base_model_of(reference: Any) -> BaseModel:
    """Return a transformers model as readers want it."""
    spec = ModelSpec.from_config(reference.config, base_name=BASE_NAME)
    return BaseModel(spec, StateDict(reference.state_dict()))


def make_catalog(
    data_dir: Path,
    *,
    limits: AdapterLimits | None = None,
    **settings: Any,
) -> AdapterCatalog:
    """Open a catalogue for the tiny base; the caller closes it.

    Args:
        settings: of the catalogue, and those of `StoragePlaces`.
    """
    names = {field.name for field in dataclasses.fields(StoragePlaces)}
    places = {name: settings.pop(name) for name in names & settings.keys()}
    base_name = settings.pop("base_name", BASE_NAME)
    aliases = settings.get("base_aliases", ())
    return AdapterCatalog(
        data_dir=data_dir,
        pool_layout=PoolLayout(TINY),
        base_name=base_name,
        reader=FolderReader(tiny_base_model(), (base_name, *aliases), limits),
        limits=limits,
        places=StoragePlaces(**places),
        **settings,
    )


@functools.cache
def tiny_base_model() -> BaseModel:
    """Return `make_tiny_base()` as readers want it."""
    return base_model_of(make_tiny_base())
