"""The numbers of an adapter, in the one form in which they are stored, packed and identified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loraplex_memory.adapter_spec import AdapterRanks, AdapterSpec, Part, ordered
from loraplex_memory.layout import PROJECTIONS, Projection

#: (layer, projection)
ModuleKey = tuple[int, Projection]
#: (name of a part, layer); no layer for a part of the whole model.
PartKey = tuple[str, int | None]


@dataclass(frozen=True)
class LoRAPair:
    """One linear's update: `delta(x) = scale * B (A x)` with A `[R, in]` and B `[out, R]`."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterWeights:
    """Immutable; tensors are float32, float16 or bfloat16 on the host.

    Attributes:
        lora: the pairs, by module.
        parts: everything else, matrices of the shapes that `adapter_spec` gives at their names.
        token_ids, head_token_ids, invocation_token_ids: see `AdapterSpec`.
    """

    lora: Mapping[ModuleKey, LoRAPair] = field(default_factory=dict)
    parts: Mapping[PartKey, torch.Tensor] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    head_token_ids: tuple[int, ...] = ()
    invocation_token_ids: tuple[int, ...] = ()

    def spec(self, num_layers: int) -> AdapterSpec:
        """Return all but the numbers.

        Raises:
            ValueError: a part has different shapes in different layers.
        """
        return AdapterSpec(
            ranks=self._ranks(num_layers),
            parts=ordered(self._part(name) for name in {name for name, _ in self.parts}),
            token_ids=self.token_ids,
            head_token_ids=self.head_token_ids,
            invocation_token_ids=self.invocation_token_ids,
        )

    def _ranks(self, num_layers: int) -> AdapterRanks:
        return tuple(
            tuple(self.lora[layer, p].rank if (layer, p) in self.lora else 0 for p in PROJECTIONS)
            for layer in range(num_layers)
        )

    def _part(self, name: str) -> Part:
        layers = sorted(layer for part, layer in self.parts if part == name and layer is not None)
        shapes = {tuple(tensor.shape) for (part, _), tensor in self.parts.items() if part == name}
        if len(shapes) != 1:
            raise ValueError(f"{name} has different shapes: {sorted(shapes)}")
        num_rows, row_elems = shapes.pop()
        return Part(name, num_rows, row_elems, tuple(layers))
