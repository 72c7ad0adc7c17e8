"""Whether a folder could be registered, and what would become of everything in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS
from loraplex_server.adapters.checks import AdapterChecks, CheckedAdapter
from loraplex_server.adapters.errors import AdapterRefused
from loraplex_server.adapters.report import ReadingReport


@dataclass(frozen=True)
class ServedForm:
    """What would be kept of an adapter.

    Attributes:
        adapter_id: its identity.
        base_model: the base that its configuration names.
        rank_max: the largest rank, once folded.
        target_modules: projections with LoRA in at least one layer.
        parts: what it brings beside them (`adapter_spec`).
        num_virtual_tokens: that stand before every prompt.
        size_bytes: of its tensors, once folded.
        pool_pages: that it takes while resident.
        is_native: nothing had to be folded.
        self_test_error: the largest, relative.
    """

    adapter_id: str
    base_model: str | None
    rank_max: int
    target_modules: tuple[str, ...]
    parts: tuple[str, ...]
    num_virtual_tokens: int
    size_bytes: int
    pool_pages: int
    is_native: bool
    self_test_error: float


@dataclass(frozen=True)
class Validation:
    """The answer: `form` if the adapter can be served exactly, or else the reasons.

    `report` accounts for every field and tensor either way; it is None where the adapter was
    refused before anything was read.
    """

    reasons: tuple[str, ...]
    report: ReadingReport | None
    form: ServedForm | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        form = self.form
        return {
            "accepted": form is not None,
            "reasons": list(self.reasons),
            "adapter": form and {name: getattr(form, name) for name in form.__dataclass_fields__},
            "report": self.report.to_json() if self.report is not None else [],
        }


def validate(
    checks: AdapterChecks, folder: Path, *, check_base: bool = True, max_pages: int | None = None
) -> Validation:
    """Read, fold and test a folder, and keep nothing.

    Args:
        check_base: refuse an adapter whose configuration names another base model.
        max_pages: pages of the pool, if there is one.

    Raises:
        InvalidUpload, UploadTooLarge, SelfTestFailed, StorageFailed
    """
    try:
        checked = checks.check(folder, name=None, check_base=check_base, max_pages=max_pages)
    except AdapterRefused as refusal:
        return Validation(refusal.reasons, refusal.report, None)
    return Validation((), checked.report, _served_form(checked))


def _served_form(checked: CheckedAdapter) -> ServedForm:
    spec = checked.spec
    columns = zip(PROJECTIONS, zip(*spec.ranks, strict=True), strict=True)
    return ServedForm(
        adapter_id=checked.adapter_id,
        base_model=checked.base_model,
        rank_max=max(map(max, spec.ranks)),
        target_modules=tuple(projection for projection, ranks in columns if any(ranks)),
        parts=tuple(part.name for part in spec.parts),
        num_virtual_tokens=spec.num_virtual_tokens,
        size_bytes=_size_bytes(checked.weights),
        pool_pages=checked.num_pages,
        is_native=checked.is_native,
        self_test_error=checked.self_test_error,
    )


def _size_bytes(weights: AdapterWeights) -> int:
    tensors = [side for pair in weights.lora.values() for side in (pair.a, pair.b)]
    tensors += weights.parts.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
