"""What is known of one registered adapter, and what bounds an adapter may not pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.adapters.registration import UPLOAD, NameSettings

#: Among `readers`: every tenant.
EVERYBODY: Final = "*"


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
    """One version of a name: the immutable adapter that it stands for, and the name's settings.

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
        created: Unix time, seconds, when the version was registered.
        version: counts a name's versions from 1; never given twice.
        is_current: whether the name alone stands for it.
        native_bytes: the uploaded files, kept where the canonical file is not them.
        self_test_error: the largest relative error of its self-test; None if there was none.
        source: `upload`, or where the server fetched it.
        last_used: Unix time of the name's last use, up to a minute late; None if never used.
        settings: of the name, see `NameSettings`.
        owner: the tenant whose it is; "" is nobody's in particular.
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
    version: int = 1
    is_current: bool = True
    native_bytes: int = 0
    self_test_error: float | None = None
    source: str = UPLOAD
    last_used: int | None = None
    settings: NameSettings = field(default_factory=NameSettings)
    owner: str = ""

    @property
    def defaults(self) -> AdapterDefaults:
        """What its requests get where they do not say otherwise."""
        return self.settings.defaults

    @property
    def readers(self) -> tuple[str, ...]:
        """Tenants beside the owner who may use it; `*` stands for all."""
        if self.settings.readers is not None:
            return self.settings.readers
        return () if self.owner else (EVERYBODY,)
