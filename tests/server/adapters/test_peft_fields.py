"""The table of configuration fields, against the installed PEFT."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig

from loraplex_server.adapters.formats.config_fields import is_off
from loraplex_server.adapters.formats.lora_fields import (
    APPLIED,
    COMMON,
    UNSUPPORTED,
    WITHOUT_EFFECT,
)

OURS_ONLY = {"enable_lora", "merge_weights"}  # fields of PEFT before 0.4


def test_every_field_of_the_installed_peft_is_in_exactly_one_group():
    groups = [APPLIED, COMMON, WITHOUT_EFFECT.keys(), UNSUPPORTED.keys()]
    known = [field for group in groups for field in group]
    assert len(known) == len(set(known))
    assert set(known) - OURS_ONLY == {field.name for field in dataclasses.fields(LoraConfig)}


def test_an_unsupported_field_is_off_in_a_default_configuration():
    defaults = LoraConfig().to_dict()
    assert all(is_off(defaults.get(field)) for field in UNSUPPORTED)
