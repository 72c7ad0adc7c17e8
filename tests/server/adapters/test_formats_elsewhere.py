"""Kinds that PEFT does not have: files as their authors write them, against the changed weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.support.adapters import make_config, make_folder, read_folder
from tests.support.peft_cases import biased_base, edit_folder, make_base, make_prompts, quiet
from tests.support.served import served_logits

PREFIX = "base_model.model."
#: Gets the name of a linear and the linear of the changed model; returns the adapter's tensors.
Change = Callable[[str, Any], dict[str, torch.Tensor]]


def change_linears(base: Any, change: Change) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a changed copy of a base, and the adapter that says the same."""
    torch.manual_seed(3)
    changed, tensors = copy.deepcopy(base), {}
    for name, module in changed.named_modules():
        if re.search(r"layers\.\d+\..*_proj$", name):
            with torch.no_grad():
                found = change(name, module)
            tensors |= {f"{PREFIX}{name}.{suffix}": tensor for suffix, tensor in found.items()}
    return changed, tensors


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in make_prompts()])


def serve(base: Any, folder: Path) -> torch.Tensor:
    weights = read_folder(folder, reference=base).weights
    return torch.cat(served_logits(base, {"a": weights}, [("a", p) for p in make_prompts()]))


def assert_served(base: Any, changed: Any, folder: Path) -> None:
    expected = logits_of(changed)
    assert (expected - logits_of(base)).abs().max() > 1.0
    torch.testing.assert_close(serve(base, folder), expected, rtol=0.0, atol=1e-4)


def replace_columns(_: str, linear: Any) -> dict[str, torch.Tensor]:
    columns = 0.3 * torch.randn(linear.out_features, 4)
    indices = torch.randperm(linear.in_features)[:4]
    linear.weight[:, indices] = 2.0 * columns
    return {"paca_w": columns, "paca_indices": indices}


def scale_and_shift(_: str, linear: Any) -> dict[str, torch.Tensor]:
    scale = 1.0 + 0.5 * torch.randn(linear.out_features)
    shift = 0.5 * torch.randn(linear.out_features)
    linear.weight.mul_(scale[:, None])
    linear.bias.copy_(linear.bias * scale + shift)
    return {"ssf_scale": scale, "ssf_shift": shift}


def test_paca_replaces_columns_of_the_base(tmp_path: Path) -> None:
    base = make_base()
    changed, tensors = change_linears(base, replace_columns)
    config = make_config(peft_type="PACA", paca_alpha=8)
    del config["lora_alpha"]
    assert_served(base, changed, make_folder(tmp_path, config=config, tensors=tensors))


def test_ssf_scales_the_bias_of_the_base_too(tmp_path: Path) -> None:
    base = biased_base()
    changed, tensors = change_linears(base, scale_and_shift)
    config = make_config(peft_type="SSF")
    del config["r"], config["lora_alpha"]
    assert_served(base, changed, make_folder(tmp_path, config=config, tensors=tensors))


@pytest.mark.parametrize("init", [True, "bat"])
def test_an_old_bone_is_a_miss_under_another_name(tmp_path: Path, init: object) -> None:
    base = make_base()
    config = peft.MissConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with quiet():
        model = peft.get_peft_model(copy.deepcopy(base), config)
        for name, parameter in model.named_parameters():
            if "miss_block" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path)

    def rename(fields: Any, tensors: dict[str, torch.Tensor]) -> None:
        del fields["miss_dropout"], fields["mini_r"]
        fields |= {"peft_type": "BONE", "init_weights": init, "base_model_name_or_path": None}
        for name in list(tensors):
            tensors[name.replace("miss_block", "bone_block")] = tensors.pop(name)

    edit_folder(tmp_path, rename)
    if init == "bat":
        with pytest.raises(Exception, match="folded rank would be min"):
            serve(base, tmp_path)
    else:
        assert_served(base, model, tmp_path)
