"""Adapters of every kind, mixed with rows of the base, in one forward batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex_memory.adapter_weights import AdapterWeights
from tests.support.peft_cases import PeftCase, make_base
from tests.support.peft_cases_other import CASES
from tests.support.peft_lora_cases import LORA_CASES
from tests.support.served import served_logits
from tests.support.served_cases import BOUND, read_case

#: All cases on the same base. A converted adapter is a plain one, once it is saved.
MIXED: list[PeftCase] = [
    case
    for case in (*LORA_CASES, *CASES.values())
    if case.base is make_base and "converted" not in case.name
]


@dataclass(frozen=True)
class Row:
    """One prompt of the batch, and what PEFT (or the base) computes for it."""

    adapter: str | None
    prompt: list[int]
    expected: torch.Tensor


def test_every_kind_of_adapter_is_exact_beside_all_others(tmp_path: Path):
    weights: dict[str, AdapterWeights] = {}
    rows: list[Row] = []
    kinds: set[str] = set()
    for at, case in enumerate(MIXED):
        folder = tmp_path / str(at)
        case.write(folder)
        weights[case.name] = read_case(case, folder).weights
        kinds.add(json.loads((folder / "adapter_config.json").read_text())["peft_type"])
        rows.append(row_of(case.name, case, case.peft_logits(folder), at))
        if at % 7 == 0:
            rows.append(row_of(None, case, case.base_logits(), at))
    assert len(weights) >= 20
    assert len(kinds) >= 15
    served = served_logits(make_base(), weights, [(row.adapter, row.prompt) for row in rows])
    errors = {
        f"{row.adapter or 'base'} ({at})": float((logits - row.expected).abs().max())
        for at, (row, logits) in enumerate(zip(rows, served, strict=True))
    }
    assert {name: error for name, error in errors.items() if not error < BOUND} == {}


def row_of(adapter: str | None, case: PeftCase, logits: list[torch.Tensor], at: int) -> Row:
    """Return one of the case's prompts, another one for each case."""
    chosen = at % len(logits)
    return Row(adapter, list(case.prompts()[chosen]), logits[chosen])
