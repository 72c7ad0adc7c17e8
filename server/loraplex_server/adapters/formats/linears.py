"""The linears of the base that tensors of an adapter belong to, by their names in PEFT files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex_memory.adapter_weights import LoRAPair, ModuleKey
from loraplex_memory.layout import ModelGeometry, Projection

#: What PEFT puts before the name of a module of the base.
PREFIX: Final = "base_model.model."

#: Linears of one layer and the projections whose rows they hold, in row order. The fused ones are
#: Phi-3's: `qkv_proj` is [q; k; v] and `gate_up_proj` is [gate; up].
LINEARS: Final[Mapping[str, tuple[Projection, ...]]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
    "mlp.gate_up_proj": ("gate", "up"),
}

_MODULE: Final = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+\.[a-z_]+)")


@dataclass(frozen=True)
class Linear:
    """One linear of the base, which may hold several projections.

    Attributes:
        module: its name inside the base model, as PEFT matches it.
        projections: whose rows it holds, in row order.
    """

    module: str
    layer: int
    projections: tuple[Projection, ...]

    def in_features(self, geometry: ModelGeometry) -> int:
        return geometry.in_features(self.projections[0])

    def out_features(self, geometry: ModelGeometry) -> int:
        return sum(geometry.out_features(projection) for projection in self.projections)

    def split_rows(
        self, tensor: torch.Tensor, geometry: ModelGeometry
    ) -> Iterator[tuple[Projection, torch.Tensor]]:
        """Yield the rows of `tensor` `[out, ...]` that belong to each projection: views."""
        row = 0
        for projection in self.projections:
            rows = geometry.out_features(projection)
            yield projection, tensor[row : row + rows]
            row += rows

    def split_pair(
        self, a: torch.Tensor, b: torch.Tensor, scale: float, geometry: ModelGeometry
    ) -> dict[ModuleKey, LoRAPair]:
        """Return a pair for each projection: A whole, and its own rows of B.

        `W + s B A` restricted to the rows of one projection is `W[rows] + s B[rows] A`: exact, at
        the price of storing A once per projection.

        Args:
            a: `[R, in]`.
            b: `[out, R]`.
        """
        pairs: dict[ModuleKey, LoRAPair] = {}
        for projection, rows in self.split_rows(b, geometry):
            # One file cannot hold one tensor under two names, so later slices get a copy of A.
            pairs[self.layer, projection] = LoRAPair(a.clone() if pairs else a, rows, scale)
        return pairs


def doubled(linears: Sequence[Linear]) -> list[Linear]:
    """Return those that share a projection with another: given both fused and split."""
    counts = Counter((linear.layer, p) for linear in linears for p in linear.projections)
    return [
        linear for linear in linears if any(counts[linear.layer, p] > 1 for p in linear.projections)
    ]


def parse_linear(module: str) -> Linear | None:
    """Return the linear of this name (`model.layers.3.self_attn.q_proj`), if it is one."""
    found = _MODULE.fullmatch(module)
    projections = LINEARS.get(found[2]) if found else None
    if found is None or projections is None:
        return None
    return Linear(module, int(found[1]), projections)


#: Tensors that nothing applies; the first that is found in the name explains it.
_EXPLAINED: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (
        re.compile(r"\.lora_[AB]\.[^.]+\.weight$"),
        "the name holds an adapter's name, as in a raw state_dict; write the folder with "
        "model.save_pretrained()",
    ),
    (
        re.compile(r"^base_model\.model\.layers\."),
        "trained on the bare decoder; load the base with AutoModelForCausalLM and save again",
    ),
    (
        re.compile(r"\.lora_[AB]\.weight$"),
        "not a linear that can carry LoRA here (" + ", ".join(LINEARS) + " of model.layers.N)",
    ),
    (
        re.compile(r"\.lora_(magnitude_vector|diag|B\.bias|latent_mapping)"),
        "of a variant of LoRA that the configuration does not switch on",
    ),
    (re.compile(r"^base_model\.model\.(lm_head|model)\..*(weight|bias)$"), "a weight of the base"),
)


def explain_tensor(name: str) -> str:
    """Return why a tensor that no reader took cannot be applied."""
    for pattern, reason in _EXPLAINED:
        if pattern.search(name):
            return reason
    return "unknown tensor; it belongs to nothing in an adapter of this kind on this base"
