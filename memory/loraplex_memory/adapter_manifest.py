"""What a request says of its adapter."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_memory.adapter_spec import AdapterSpec


@dataclass(frozen=True)
class AdapterManifest:
    """Immutable, travels with every request that names the adapter.

    Attributes:
        adapter_id: `sha256:<hex>` of the canonical tensors and config; never reused.
        path: the canonical adapter file on local disk.
        spec: all there is to know before the file is read; sizes the adapter's pages.
    """

    adapter_id: str
    path: str
    spec: AdapterSpec
