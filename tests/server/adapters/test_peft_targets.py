"""Which modules are targets, against PEFT's own rule."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

from loraplex_server.adapters.formats.config_fields import ConfigFields
from loraplex_server.adapters.formats.ledger import Ledger
from tests.support.adapters import make_config

MODULES = [
    (f"model.layers.{layer}.{linear}", layer)
    for layer in (0, 1, 2, 11)
    for linear in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["mlp.down_proj", "model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "xs"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": r"model\.\w+"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["model.layers.2.mlp.down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.1.mlp.down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.(1|2)\..*"},
        {"target_modules": r".*\.1?1\.(mlp|self_attn)\.(q|down)_proj"},
        {"target_modules": "q_proj"},
    ],
)
def test_modules_are_covered_exactly_as_in_peft(fields: dict[str, Any]):
    ledger = Ledger()
    rule = ConfigFields(make_config(**fields), ledger).target_rule()
    assert not ledger
    theirs = LoraConfig(**fields)
    for module, layer in MODULES:
        found = check_target_module_exists(theirs, module)
        is_target = bool(found) and not isinstance(found, _ExcludedModule)
        assert rule.covers(module, layer) == is_target, module
