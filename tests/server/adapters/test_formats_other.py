"""What PEFT computes is what is served: every kind of adapter but LoRA."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex_memory.adapter_weights import AdapterWeights
from tests.support.adapters import read_folder
from tests.support.peft_cases import edit_folder, make_base, quiet
from tests.support.peft_cases_other import CASES
from tests.support.peft_other_case import OtherCase
from tests.support.served import ServedModel
from tests.support.tiny_models import transformer_of

TOLERANCE = 1e-4
KINDS = ("field", "tensor")


@dataclass(frozen=True)
class Results:
    """Logits of one case for all its prompts, `[all tokens, V]`."""

    base: torch.Tensor
    expected: torch.Tensor
    served: torch.Tensor
    misread: torch.Tensor


def read(reference: Any, folder: Path) -> AdapterWeights:
    return read_folder(folder, reference=reference, check_base=False).weights


def misread(case: OtherCase, reference: Any, folder: Path) -> AdapterWeights:
    """Return what a naive reader would serve."""
    if case.misread is not None:
        return case.misread(read(reference, folder), reference)
    assert case.naive is not None
    naive = folder.with_name(f"misread {folder.name}")
    shutil.copytree(folder, naive)
    edit_folder(naive, case.naive)
    return read(reference, naive)


def serve_together(cases: list[OtherCase], root: Path) -> dict[str, Results]:
    """Serve the base, all cases and all their naive readings in one forward pass."""
    reference, prompts = cases[0].base(), cases[0].prompts()
    adapters: dict[str, AdapterWeights] = {}
    for case in cases:
        case.write(root / case.name)
        adapters[case.name] = read(reference, root / case.name)
        adapters[f"misread {case.name}"] = misread(case, reference, root / case.name)
    names = [None, *adapters]
    num_pages = 8 * len(names) * len(prompts)
    model = ServedModel(transformer_of(reference), adapters, num_kv_pages=num_pages)
    rows = iter(model.logits([(name, prompt) for name in names for prompt in prompts]))
    served = {name: torch.cat([next(rows) for _ in prompts]) for name in names}
    return {
        case.name: Results(
            base=served[None],
            expected=torch.cat(case.peft_logits(root / case.name)),
            served=served[case.name],
            misread=served[f"misread {case.name}"],
        )
        for case in cases
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Results]:
    by_base: dict[Any, list[OtherCase]] = defaultdict(list)
    for case in CASES.values():
        by_base[case.base].append(case)
    found: dict[str, Results] = {}
    for cases in by_base.values():
        found |= serve_together(cases, tmp_path_factory.mktemp("adapters"))
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_the_report_tells_of_every_field_and_tensor(tmp_path: Path, case: OtherCase) -> None:
    case.write(tmp_path)
    report = read_folder(tmp_path, reference=case.base(), check_base=False).report
    told = {kind: {e.subject for e in report.entries if e.kind == kind} for kind in KINDS}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["field"] == config.keys()
    assert told["tensor"] == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "refused" not in {entry.verdict for entry in report.entries}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_served_logits_are_those_of_peft(results: Mapping[str, Results], name: str) -> None:
    case = results[name]
    assert distance(case.base, case.expected) > 1.0, "the adapter has no effect worth a test"
    assert distance(case.served, case.expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_naive_reading_would_be_noticed(results: Mapping[str, Results], name: str) -> None:
    assert distance(results[name].misread, results[name].expected) > 1.0


def test_most_kinds_are_served_in_one_batch() -> None:
    with quiet():
        kinds = {case.config().peft_type for case in CASES.values() if case.base is make_base}
    assert len(kinds) >= 20
