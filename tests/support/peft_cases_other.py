"""Adapters of every kind but LoRA: how PEFT makes one, and how it would be misread.

A misreading changes the folder, or what was read of it, as a reader would that ignores the one
field or tensor by which the kind differs from its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.support.peft_folded_cases import FOLDED_CASES
from tests.support.peft_other_case import OtherCase
from tests.support.peft_part_cases import PART_CASES

#: By their names.
CASES: Mapping[str, OtherCase] = {
    name: make(name) for name, make in {**FOLDED_CASES, **PART_CASES}.items()
}
