"""An adapter's spec as JSON text, as the database keeps it."""

from __future__ import annotations

import json
from typing import Any

from loraplex_memory.adapter_spec import AdapterRanks, AdapterSpec, Part
from loraplex_memory.layout import PROJECTIONS


def encode_spec(spec: AdapterSpec) -> str:
    """`{"ranks": {"0.q": 8, ...}, "parts": [[name, rows, elements, layers], ...], ...}`.

    Modules without LoRA and empty lists are left out.
    """
    fields: dict[str, Any] = {
        "ranks": {
            f"{layer}.{projection}": rank
            for layer, row in enumerate(spec.ranks)
            for projection, rank in zip(PROJECTIONS, row, strict=True)
            if rank
        },
        "parts": [[p.name, p.num_rows, p.row_elems, list(p.layers)] for p in spec.parts],
        "token_ids": list(spec.token_ids),
        "head_token_ids": list(spec.head_token_ids),
        "invocation_token_ids": list(spec.invocation_token_ids),
    }
    return json.dumps({name: value for name, value in fields.items() if value})


def decode_spec(text: str, num_layers: int) -> AdapterSpec:
    """Return what `encode_spec` wrote."""
    fields: dict[str, Any] = json.loads(text)
    return AdapterSpec(
        ranks=_decode_ranks(fields.get("ranks", {}), num_layers),
        parts=tuple(
            Part(name, num_rows, row_elems, tuple(layers))
            for name, num_rows, row_elems, layers in fields.get("parts", ())
        ),
        token_ids=tuple(fields.get("token_ids", ())),
        head_token_ids=tuple(fields.get("head_token_ids", ())),
        invocation_token_ids=tuple(fields.get("invocation_token_ids", ())),
    )


def _decode_ranks(stored: dict[str, int], num_layers: int) -> AdapterRanks:
    return tuple(
        tuple(stored.get(f"{layer}.{projection}", 0) for projection in PROJECTIONS)
        for layer in range(num_layers)
    )
