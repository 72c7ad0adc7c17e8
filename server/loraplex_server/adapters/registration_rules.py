"""When other content may take the place of a name's, and when its owner has enough."""

from __future__ import annotations

from sqlalchemy import Connection

from loraplex_server.adapters.errors import (
    AdapterNameTaken,
    AdapterNotOwned,
    OwnerHasEnough,
    VersionConflict,
)
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.registry import Registry
from loraplex_server.adapters.version_row import NewVersion, VersionRow


def check_replaceable(wish: Registration, current: VersionRow | None) -> None:
    """Check that other content may take the place of what the name stands for.

    Raises:
        AdapterNameTaken, VersionConflict
    """
    current_id = current.adapter_id if current else None
    if wish.expected_id is not None and wish.expected_id != current_id:
        raise VersionConflict(wish.name, wish.expected_id, current_id)
    if current_id is not None and not wish.replace:
        raise AdapterNameTaken(wish.name, current_id)


def check_ownership(wish: Registration, current: VersionRow | None) -> None:
    """Check that whoever asks may change what the name stands for; raises AdapterNotOwned."""
    if wish.is_owners and current is not None and current.owner != wish.owner:
        raise AdapterNotOwned(wish.name)


def check_owner(
    registry: Registry,
    connection: Connection,
    wish: Registration,
    current: VersionRow | None,
    new: NewVersion | None,
) -> None:
    """Check that the owner may have one more version, in a transaction that holds its lock.

    Args:
        current: what the name stands for; its owner stays its owner.
        new: what is to be added; None where its size is not known yet.

    Raises:
        OwnerHasEnough
    """
    limits, owner = wish.limits, current.owner if current else wish.owner
    if not owner or not (limits.max_adapters or limits.max_bytes):
        return
    num_names, num_bytes = registry.owned(connection, owner)
    if limits.max_adapters and current is None and num_names >= limits.max_adapters:
        raise OwnerHasEnough(
            f"the tenant {owner!r} has {num_names} adapters and may have {limits.max_adapters}; "
            "delete one first, or have the server's tenant_max_adapters raised"
        )
    size = new.adapter.size_bytes + new.adapter.native_bytes if new else 1
    if limits.max_bytes and num_bytes + size > limits.max_bytes:
        raise OwnerHasEnough(
            f"the tenant {owner!r} has {num_bytes} bytes of adapters, old versions included, and "
            f"may have {limits.max_bytes}; delete some first, or have the server's "
            "tenant_max_adapter_bytes raised"
        )
