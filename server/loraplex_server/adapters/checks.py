"""From an untrusted folder to an adapter that is known to be served exactly: read, fit, tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import AdapterRefused
from loraplex_server.adapters.identity import adapter_id
from loraplex_server.adapters.reader import AdapterReader
from loraplex_server.adapters.report import ReadingReport
from loraplex_server.adapters.self_test import self_test
from loraplex_server.background import run_in_background


@dataclass(frozen=True)
class CheckedAdapter:
    """A folder that can be registered; `weights` may be mapped from its files."""

    adapter_id: str
    weights: AdapterWeights
    spec: AdapterSpec
    num_pages: int
    base_model: str | None
    report: ReadingReport
    is_native: bool
    self_test_error: float

    def report_json(self) -> str:
        return json.dumps(self.report.to_json())


class AdapterChecks:
    """Stateless; safe from any thread. Takes as long as reading the adapter a few times, and if it
    is folded with decompositions of the base's weights, minutes: in the background, lest torch's
    threads and those of the engine, which are as many as there are cores, wait for each other.
    """

    def __init__(
        self, reader: AdapterReader, pool_layout: PoolLayout, at_stage: Callable[[str], None]
    ) -> None:
        self._reader = reader
        self._pool_layout = pool_layout
        self._at_stage = at_stage

    def check(
        self, folder: Path, *, name: str | None, check_base: bool, max_pages: int | None
    ) -> CheckedAdapter:
        """Read the folder, and run the self-test on what is to be served.

        Args:
            name: for messages.
            max_pages: pages of the pool; an adapter that needs more is refused.

        Raises:
            AdapterRefused, InvalidUpload, UploadTooLarge, SelfTestFailed, StorageFailed
        """
        return run_in_background(
            "adapter-check", lambda: self._check(folder, name, check_base, max_pages)
        )

    def _check(
        self, folder: Path, name: str | None, check_base: bool, max_pages: int | None
    ) -> CheckedAdapter:
        try:
            with storage_errors("read the upload"):
                read = self._reader.read(folder, check_base=check_base)
                content_id = adapter_id(read.weights)
        except AdapterRefused as refusal:
            raise AdapterRefused(refusal.reasons, name, refusal.report) from refusal
        self._at_stage("read")
        spec = read.weights.spec(self._pool_layout.geometry.num_layers)
        layout = AdapterLayout(self._pool_layout, spec)
        if max_pages is not None and layout.num_pages > max_pages:
            reason = (
                f"it needs {layout.num_pages} pages of the memory pool, which has {max_pages}; "
                "give the server a larger pool, or train a smaller rank"
            )
            raise AdapterRefused((reason,), name, read.report)
        error = self_test(read.weights, layout)
        self._at_stage("tested")
        return CheckedAdapter(
            adapter_id=content_id,
            weights=read.weights,
            spec=spec,
            num_pages=layout.num_pages,
            base_model=read.base_model,
            report=read.report,
            is_native=read.is_native,
            self_test_error=error,
        )
