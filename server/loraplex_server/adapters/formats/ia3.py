"""`peft_type=IA3`: vectors on outputs, and on the inputs of feed-forward modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch

from loraplex_memory.adapter_spec import in_scale, out_scale
from loraplex_memory.adapter_weights import AdapterWeights, ModuleKey, PartKey
from loraplex_memory.layout import SITES, Projection
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.scaling import join_scales, scale_gated_output
from loraplex_server.adapters.formats.field_table import FieldTable
from loraplex_server.adapters.formats.folder import LinearTensors, PeftFolder
from loraplex_server.adapters.formats.linears import Linear
from loraplex_server.adapters.formats.whole_modules import read_whole_modules
from loraplex_server.adapters.peft_pattern import ModulePattern

FIELDS: Final = FieldTable(
    frozenset({"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"}),
    {"init_ia3_weights": "initialisation only"},
    {"fan_in_fan_out": "is for Conv1D models; save the adapter again with false"},
)
_SUFFIX: Final = "ia3_l"
_ONE_INPUT: Final = (
    "scales its input apart from the other linears that share it, so its folded rank would be "
    "min(in, out); leave it out of feedforward_modules, which scales its output"
)


@dataclass
class _Scales:
    """All vectors: `[in]` and `[out]`."""

    inputs: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)
    outputs: dict[ModuleKey, torch.Tensor] = field(default_factory=dict)


def read_ia3(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read an IA3; a `FormatReader`."""
    FIELDS.account(folder.config)
    rule = folder.config.target_rule()
    on_inputs = _FeedForward(folder)
    scales = _Scales()
    for group in folder.linears((_SUFFIX,), rule=rule):
        _take(folder, base, group, scales, on_input=on_inputs.holds(group.linear.module))
    parts = read_whole_modules(folder, base)
    for layer in range(base.geometry.num_layers):
        parts |= _layer_parts(folder, layer, scales)
    return AdapterWeights(parts=parts)


class _FeedForward:
    """PEFT's choice of modules whose inputs are scaled: by ends of names, or one pattern."""

    def __init__(self, folder: PeftFolder) -> None:
        value = folder.config.raw("feedforward_modules")
        self._pattern: ModulePattern | None = None
        self._ends: tuple[str, ...] = ()
        if isinstance(value, str):
            self._pattern = folder.config.pattern("feedforward_modules", value)
        else:
            self._ends = folder.config.names("feedforward_modules")

    def holds(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(module)
        # PEFT compares ends of names, not whole parts of them.
        return module.endswith(self._ends)


def _take(
    folder: PeftFolder, base: BaseModel, group: LinearTensors, scales: _Scales, *, on_input: bool
) -> None:
    linear, name = group.linear, group.names[_SUFFIX]
    if on_input:
        shape = 1, linear.in_features(base.geometry)
        vector = folder.take(name, shape, fold=_how(linear)).flatten()
        for projection in linear.projections:
            scales.inputs[linear.layer, projection] = vector
        return
    shape = linear.out_features(base.geometry), 1
    vector = folder.take(name, shape).flatten()
    for projection, rows in linear.split_rows(vector, base.geometry):
        scales.outputs[linear.layer, projection] = rows


def _how(linear: Linear) -> str | None:
    return "into the output scale of up_proj" if linear.projections == ("down",) else None


def _layer_parts(folder: PeftFolder, layer: int, scales: _Scales) -> dict[PartKey, torch.Tensor]:
    outputs = {p: scale for (at, p), scale in scales.outputs.items() if at == layer}
    if (down := scales.inputs.get((layer, "down"))) is not None:
        outputs["up"] = scale_gated_output(outputs.get("up"), down)
    parts: dict[PartKey, torch.Tensor] = {}
    parts |= {(out_scale(p), layer): scale[None].clone() for p, scale in outputs.items()}
    for site, projections in SITES.items():
        own = {p: scales.inputs[layer, p] for p in projections if (layer, p) in scales.inputs}
        if not own or site == "down":
            continue
        shared = _shared(projections, own)
        if shared is None:
            folder.ledger.refuse(_ONE_INPUT, f"layer {layer} {', '.join(own)}")
        else:
            parts[in_scale(site), layer] = shared[None].clone()
    return parts


def _shared(
    projections: tuple[Projection, ...], own: dict[Projection, torch.Tensor]
) -> torch.Tensor | None:
    return join_scales(own.values()) if len(own) == len(projections) else None
