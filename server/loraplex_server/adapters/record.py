"""What is known of one registered adapter, and what bounds an adapter may not pass."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_memory.adapter_spec import AdapterSpec


@dataclass(frozen=True)
class AdapterLimits:
    """Bounds on what one upload may cost, checked before the cost arises.

    Attributes:
        max_rank: the largest rank of any module, once folded.
        max_dense_bytes: of the parts of one adapter that are as long as a vocabulary, a list of
            tokens or a prompt: embeddings, heads, rows of tokens, soft prompts, prefixes.
        max_upload_bytes: of one upload as received, and of what its archive unpacks to.
        max_config_bytes: of `adapter_config.json`.
        max_header_bytes: of the safetensors header, which names every tensor.
        max_tensors: tensors in one adapter.
        max_archive_entries: files and folders in one archive.
    """

    max_rank: int = 256
    max_dense_bytes: int = 256 << 20
    max_upload_bytes: int = 4 << 30
    max_config_bytes: int = 1 << 20
    max_header_bytes: int = 16 << 20
    max_tensors: int = 20_000
    max_archive_entries: int = 1_000


@dataclass(frozen=True)
class AdapterRecord:
    """One name and the immutable adapter it stands for.

    Attributes:
        name: what a request puts into `model`.
        id: `sha256:<hex>` of the canonical tensors and scales (`identity`).
        base_model: the base it was trained on, as its config says; the served base's name if
            the config does not say.
        spec: its ranks, and what else it has.
        rank_max: the largest of them.
        target_modules: projections that carry LoRA in at least one layer (`q` ... `down`).
        size_bytes: the canonical file.
        pool_pages: pages it takes in the pool while resident.
        created: Unix time, seconds, when the name was registered.
    """

    name: str
    id: str
    base_model: str
    spec: AdapterSpec
    rank_max: int
    target_modules: tuple[str, ...]
    size_bytes: int
    pool_pages: int
    created: int
