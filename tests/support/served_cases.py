"""Folders of PEFT cases, read and served, compared with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.reader import ReadAdapter
from tests.support.adapters import base_model_of
from tests.support.peft_cases import PeftCase
from tests.support.served import served_logits

#: How far served logits may be from PEFT's, both in float32.
BOUND = 1e-4
#: The least effect of an adapter on a logit that makes a comparison worth while.
LEAST_EFFECT = 2.0


def read_case(case: PeftCase, folder: Path) -> ReadAdapter:
    """Read the folder for the case's base."""
    return FolderReader(base_model_of(case.base()), ("tiny",)).read(folder, check_base=False)


def largest_error(case: PeftCase, folder: Path, expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference between the folder's served logits and `expected`."""
    weights = read_case(case, folder).weights
    prompts = [("adapter", prompt) for prompt in case.prompts()]
    served = served_logits(case.base(), {"adapter": weights}, prompts)
    return largest_difference(served, expected)


def largest_difference(rows: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two lists of logits; NaN if there is one."""
    differences = [(row - other).abs().max() for row, other in zip(rows, others, strict=True)]
    return float(torch.stack(differences).max())


def assert_is_served_exactly(case: PeftCase, folder: Path) -> None:
    """The folder has a strong effect, and is served as PEFT computes it."""
    expected = case.peft_logits(folder)
    assert largest_difference(expected, case.base_logits()) > LEAST_EFFECT
    error = largest_error(case, folder, expected)
    assert error < BOUND, f"{error:.1e}"
