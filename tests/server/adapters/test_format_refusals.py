"""What readers of single kinds refuse, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loraplex_server.adapters.errors import AdapterRefused
from loraplex_server.adapters.record import AdapterLimits
from tests.support.adapters import read_folder
from tests.support.peft_cases import (
    LINEARS,
    Config,
    Naive,
    Tensors,
    dropped,
    edit_folder,
    fields,
)
from tests.support.peft_cases_other import CASES
from tests.support.peft_other_case import OtherCase, case, tensors


@dataclass(frozen=True)
class Refusal:
    """What is wrong with an adapter, and a part of each thing that is said."""

    adapter: OtherCase
    edit: Naive | None
    said: tuple[str, ...]
    limits: AdapterLimits | None = None


def made(config: Callable[[], peft.PeftConfig], **options: Any) -> OtherCase:
    return case(config, **options)("refused")


def without_task(config: Config, _: Tensors) -> None:
    del config["loraplex_task"]


def renamed(old: str, new: str) -> Naive:
    def edit(_: Config, found: Tensors) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found.pop(name)

    return edit


def added(like: str, name: str, shape: tuple[int, ...], saved: str | None = None) -> Naive:
    """Return an edit that puts another tensor beside each that ends `like`."""

    def edit(config: Config, found: Tensors) -> None:
        config["modules_to_save"] = saved and [saved]
        config["target_modules"] = None
        for known in [known for known in found if known.endswith(like)]:
            found[known.removesuffix(like) + name] = torch.ones(shape)

    return edit


REFUSALS: dict[str, Refusal] = {
    "loha above the rank limit": Refusal(
        made(lambda: peft.LoHaConfig(r=5, target_modules=["q_proj", "v_proj"])),
        None,
        ("q_proj", "folded rank 25 is above the limit of 16", "22400 bytes at 16 bits"),
        AdapterLimits(max_rank=16),
    ),
    "lokr above the rank limit": Refusal(
        CASES["lokr"],
        None,
        ("folded rank 64 is above the limit of 63",),
        AdapterLimits(max_rank=63),
    ),
    "lokr whose product has another shape": Refusal(
        CASES["lokr"],
        tensors("q_proj.lokr_w1", lambda w: w[:, 1:]),
        ("Kronecker product is [64, 56] where the base needs [64, 64]",),
    ),
    "lokr without a matrix": Refusal(
        CASES["lokr factored"], dropped("w2_b"), ("needs lokr_w2, or both",)
    ),
    "loha with rslora": Refusal(
        CASES["loha"], fields(use_rslora=True), ("PEFT's LyCORIS adapters have no such option",)
    ),
    "adalora with more ranks than it began with": Refusal(
        CASES["adalora"], fields(init_r=4), ("holds more than init_r=4 ranks",)
    ),
    "adalora without a scale": Refusal(
        CASES["adalora"], fields(lora_alpha=0), ("lora_alpha=0", "set it above 0")
    ),
    "vera without its projections": Refusal(
        CASES["vera"], dropped("vera_A"), ("base_model.vera_A", "is missing")
    ),
    "vera with projections it says are not there": Refusal(
        CASES["vera"], fields(save_projection=False), ("save_projection=false", "set it to true")
    ),
    "pvera that samples": Refusal(
        CASES["pvera"], fields(sample_at_inference=True), ("serve the mean",)
    ),
    "vblora that points outside its bank": Refusal(
        CASES["vblora chosen"],
        tensors("topk_indices", lambda indices: indices + 35),
        ("points outside the bank of 40",),
    ),
    "unilora that points outside its numbers": Refusal(
        CASES["unilora saved"],
        tensors("indices_A", lambda indices: indices - 1),
        ("points outside the 64 shared numbers",),
    ),
    "unilora on the head": Refusal(
        CASES["unilora"],
        fields(target_modules=[*LINEARS, "lm_head"]),
        ("names the head", "save_indices=true"),
    ),
    "unilora on nothing it names": Refusal(
        CASES["unilora"], fields(target_modules=None), ("names no modules", "save_indices=true")
    ),
    "tinylora without a vector": Refusal(
        CASES["tinylora"], dropped("tinylora_v.3"), ("base_model.tinylora_v.3", "is missing")
    ),
    "tinylora with a vector too many": Refusal(
        CASES["tinylora"], fields(weight_tying=0.5), ("base_model.tinylora_v.10", "unknown tensor")
    ),
    "miss by blocks of the base": Refusal(
        CASES["miss"],
        fields(init_weights="bat"),
        ("init_weights='bat'", "folded rank would be min(in, out)", "init_weights=true"),
    ),
    "gralora that cannot be cut": Refusal(
        CASES["gralora"], fields(gralora_k=3), ("gralora_k=3: does not divide r=8",)
    ),
    "delora with an alpha": Refusal(
        CASES["delora"], fields(lora_alpha=8), ("is an option of LoRA, not of DeLoRA",)
    ),
    "hra with a reflection of no length": Refusal(
        CASES["hra"], tensors("hra_u", torch.zeros_like), ("a reflection of length 0",)
    ),
    "hra with reflections that are no basis": Refusal(
        CASES["hra orthogonal"], tensors("hra_u", torch.ones_like), ("gives NaN or infinity",)
    ),
    "poly without a task": Refusal(
        CASES["poly"],
        without_task,
        ("n_tasks is 3", "write the one to serve, 0 to 2, into loraplex_task"),
    ),
    "poly with a task it does not have": Refusal(
        CASES["poly"], fields(loraplex_task=3), ("loraplex_task=3", "0 to 2")
    ),
    "a multitask prompt without a task": Refusal(
        CASES["multitask prompt"], without_task, ("num_tasks is 3", "loraplex_task")
    ),
    "ia3 on the input of one of three": Refusal(
        made(
            lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=["q_proj"]),
            strength={"": 1.0},
        ),
        None,
        ("layer 0 q", "folded rank would be min(in, out)", "leave it out of feedforward_modules"),
    ),
    "ia3 on inputs that differ": Refusal(
        made(
            lambda: peft.IA3Config(
                target_modules=["gate_proj", "up_proj"],
                feedforward_modules=["gate_proj", "up_proj"],
            ),
            strength={"": 1.0},
        ),
        None,
        ("layer 1 gate, up", "apart from the other linears"),
    ),
    "a norm that the configuration leaves out": Refusal(
        CASES["ln tuning"], fields(target_modules=["norm"]), ("PEFT would not load it",)
    ),
    "a linear trained as a norm": Refusal(
        made(lambda: peft.LNTuningConfig(target_modules=["q_proj"])),
        None,
        ("is no norm of the base",),
    ),
    "tokens named twice": Refusal(
        CASES["trainable tokens"], fields(token_indices=[5, 5, 6]), ("needs different token ids",)
    ),
    "tokens beyond the vocabulary": Refusal(
        CASES["trainable tokens"], fields(token_indices=[5, 6, 101]), ("from 0 to 100",)
    ),
    "rows of a tied head that differ": Refusal(
        CASES["trainable tokens tied"],
        tensors("lm_head.trainable", lambda rows: rows + 1),
        ("differs from the embedding's rows",),
    ),
    "a prompt of another width": Refusal(
        CASES["prompt tuning"], fields(token_dim=32), ("token_dim=32", "have 64 elements")
    ),
    "a prompt for two decoders": Refusal(
        CASES["prompt tuning"], fields(num_transformer_submodules=2), ("a decoder has one",)
    ),
    "a prefix of all query heads": Refusal(
        CASES["prefix tuning"],
        fields(num_attention_heads=4),
        ("num_attention_heads=4", "keys and values of the base need 2"),
    ),
    "a prefix above the byte limit": Refusal(
        CASES["prefix tuning"],
        None,
        ("kv_prefix", "above the limit"),
        AdapterLimits(max_dense_bytes=64),
    ),
    "one linear both fused and split": Refusal(
        CASES["vera fused"],
        renamed("gate_up_proj", "up_proj"),
        ("up_proj",),
    ),
    "ia3 both fused and split": Refusal(
        CASES["ia3"], added("k_proj.ia3_l", "qkv_proj.ia3_l", (128, 1)), ("both fused and split",)
    ),
    "a norm saved twice": Refusal(
        CASES["ln tuning"],
        added("model.norm.ln_tuning_layers.weight", "model.norm.weight", (64,), "model.norm"),
        ("given twice: modules_to_save names it too",),
    ),
    "a tensor of nothing": Refusal(
        CASES["hra"], renamed("layers.1.mlp.up_proj", "layers.1.mlp.router"), ("router.hra_u",)
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_exactly_is_refused(tmp_path: Path, name: str) -> None:
    refusal = REFUSALS[name]
    refusal.adapter.write(tmp_path)
    if refusal.edit is not None:
        edit_folder(tmp_path, refusal.edit)
    reference = refusal.adapter.base()
    with pytest.raises(AdapterRefused) as refused:
        read_folder(tmp_path, reference=reference, check_base=False, limits=refusal.limits)
    told = "\n".join(refused.value.reasons)
    assert all(part in told for part in refusal.said), told
