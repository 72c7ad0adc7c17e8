"""What the catalogue needs of a reader of adapter folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.report import ReadingReport


@dataclass(frozen=True)
class ReadAdapter:
    """A folder that passed every check.

    Attributes:
        weights: may be mapped from the folder's file, which must stay until they are not used
            any more.
        base_model: the base that the configuration names, if it names one.
        report: what became of every tensor and every field.
        is_native: `weights` are the uploaded tensors themselves; where they are not, they were
            computed from them, and only the uploaded folder could be read again.
    """

    weights: AdapterWeights
    base_model: str | None
    report: ReadingReport
    is_native: bool


class AdapterReader(Protocol):
    """Reads folders for one base model; safe to use from any thread."""

    def read(self, folder: Path, *, check_base: bool = True) -> ReadAdapter:
        """Read and check everything in `folder`.

        Args:
            check_base: refuse an adapter whose configuration names another base model.

        Raises:
            AdapterRefused: it is an adapter, but not one that can be served exactly.
            InvalidUpload: the files are missing, damaged or not what their names say.
            UploadTooLarge
            OSError: the disk failed.
        """
        ...
