"""A stored version as the rest of the server sees it."""

from __future__ import annotations

from loraplex_memory.layout import PROJECTIONS
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.version_row import VersionRow


def make_record(row: VersionRow, num_pages: int, unwritten_use: int | None) -> AdapterRecord:
    """Return the record of a version.

    Args:
        num_pages: that it takes in the pool.
        unwritten_use: when its name was used last, if the registry does not know that yet.
    """
    spec = row.adapter.spec
    ranks = zip(PROJECTIONS, zip(*spec.ranks, strict=True), strict=True)
    return AdapterRecord(
        name=row.name,
        id=row.adapter_id,
        base_model=row.base_model,
        spec=spec,
        rank_max=max(map(max, spec.ranks)),
        target_modules=tuple(projection for projection, own in ranks if any(own)),
        size_bytes=row.adapter.size_bytes,
        pool_pages=num_pages,
        created=row.created,
        version=row.version,
        is_current=row.is_current,
        native_bytes=row.adapter.native_bytes,
        self_test_error=row.adapter.self_test_error,
        source=row.source,
        last_used=max(unwritten_use or 0, row.last_used or 0) or None,
        settings=row.settings,
        owner=row.owner,
    )
