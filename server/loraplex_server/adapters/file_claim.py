"""Whose the adapters' files are: the registry's that came first, and no other's.

A server deletes files that its registry does not know. Were it led to those of another registry, as
by a forgotten LORAPLEX_REGISTRY_URL, that would be all of them.
"""

from __future__ import annotations

from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import StorageFailed


def claim_files(registry_id: str, blobs: BlobStore) -> None:
    """Make sure that the files are this registry's, before any is swept.

    Raises:
        StorageFailed: they are another one's, or cannot be asked.
    """
    with storage_errors("open the adapters' files"):
        foreign = blobs.claim(registry_id)
    if foreign is not None:
        raise StorageFailed(
            "the files at blob_url belong to another registry, and this server would delete them, "
            "as its own does not know them: set LORAPLEX_REGISTRY_URL to that registry, or "
            "blob_url to another folder. If that registry is gone for good, delete "
            f"{foreign} to give its files up"
        )
