"""What the engine must know of an adapter before it reads a single tensor."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_memory.adapter_layout import AdapterRanks


@dataclass(frozen=True)
class AdapterManifest:
    """Immutable, travels with every request that names the adapter.

    Attributes:
        adapter_id: `sha256:<hex>` of the canonical tensors and config; never reused.
        path: the canonical adapter file on local disk.
        ranks: true rank per layer and projection; sizes the adapter's pages.
    """

    adapter_id: str
    path: str
    ranks: AdapterRanks
