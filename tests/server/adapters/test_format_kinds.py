"""Every kind of adapter that PEFT knows is read in full, or refused with a reason of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft import PeftType
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraplex_server.adapters.errors import AdapterRefused
from loraplex_server.adapters.formats import (
    adalora,
    deft,
    delora,
    gralora,
    hra,
    ia3,
    kv_prefix,
    lycoris,
    miss,
    norms,
    poly,
    soft_prompts,
    tasks,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vectors,
    vera,
)
from loraplex_server.adapters.formats.config_fields import is_off
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.registry import READERS, REFUSED
from tests.support.adapters import make_folder, read_folder
from tests.support.peft_cases import quiet
from tests.support.peft_cases_other import CASES

TABLES: dict[str, FieldTable] = {
    "ADALORA": adalora.FIELDS,
    "BEFT": vectors.BEFT_FIELDS,
    "CARTRIDGE": kv_prefix.CARTRIDGE_FIELDS,
    "CPT": soft_prompts.CPT_FIELDS,
    "DEFT": deft.FIELDS,
    "DELORA": delora.FIELDS,
    "GRALORA": gralora.FIELDS,
    "HRA": hra.FIELDS,
    "IA3": ia3.FIELDS,
    "LN_TUNING": norms.FIELDS,
    "LOHA": lycoris.LOHA_FIELDS,
    "LOKR": lycoris.LOKR_FIELDS,
    "MISS": miss.FIELDS,
    "MULTITASK_PROMPT_TUNING": soft_prompts.MULTITASK_FIELDS,
    "POLY": poly.FIELDS,
    "PREFIX_TUNING": kv_prefix.PREFIX_FIELDS,
    "PROMPT_TUNING": soft_prompts.PROMPT_FIELDS,
    "PVERA": vera.PVERA_FIELDS,
    "P_TUNING": soft_prompts.P_TUNING_FIELDS,
    "TINYLORA": tinylora.FIELDS,
    "TRAINABLE_TOKENS": trainable_tokens.FIELDS,
    "UNILORA": unilora.FIELDS,
    "VBLORA": vblora.FIELDS,
    "VERA": vera.VERA_FIELDS,
}
#: Read here, and unknown to PEFT.
NOT_IN_PEFT = {"BONE", "PACA", "SSF"}


def own_fields(kind: str) -> dict[str, Any]:
    """Return the fields that only this kind's configuration has, and their defaults."""
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])
    return {field.name: field.default for field in fields if field.name not in common}


def test_every_kind_of_peft_is_read_or_refused() -> None:
    kinds = {kind.value for kind in PeftType}
    assert not READERS.keys() & REFUSED.keys()
    assert kinds <= READERS.keys() | REFUSED.keys()
    assert READERS.keys() - kinds == NOT_IN_PEFT


def test_every_refused_kind_has_a_reason_of_its_own() -> None:
    assert len(set(REFUSED.values())) == len(REFUSED)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_refused_kind_is_told_why_and_what_to_do(tmp_path: Path, kind: str) -> None:
    folder = make_folder(tmp_path, config={"peft_type": kind, "task_type": "CAUSAL_LM"})
    with pytest.raises(AdapterRefused) as refused:
        read_folder(folder)
    assert REFUSED[kind] in str(refused.value)


def test_every_read_kind_has_a_table_and_a_case() -> None:
    assert TABLES.keys() == READERS.keys() - NOT_IN_PEFT - {"LORA"}
    with quiet():
        assert TABLES.keys() == {case.config().peft_type.value for case in CASES.values()}


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_every_field_of_the_installed_peft_is_accounted_for(kind: str) -> None:
    table = TABLES[kind]
    groups = [table.applied, table.without_effect.keys(), table.unsupported.keys()]
    assert sum(map(len, groups)) == len(table.names), "a field is in two groups"
    assert table.names - {tasks.FIELD} == own_fields(kind).keys()


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_an_unsupported_field_is_off_by_default(kind: str) -> None:
    defaults = own_fields(kind)
    assert all(is_off(defaults[field]) for field in TABLES[kind].unsupported)
