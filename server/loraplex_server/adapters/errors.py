"""Errors of the adapter catalogue.

AdapterError
├── AdapterNotFound      no adapter has this name
├── AdapterNameTaken     the name belongs to an adapter with other content
├── VersionConflict      the name does not have the content that was to be replaced
├── AmbiguousVersion     several versions of the name have ids that begin so
├── VersionIsCurrent     the version that the name stands for cannot be deleted by itself
├── AdapterNotOwned      it can be read, and is another's to change
├── OwnerHasEnough       its owner may not have more adapters, or more bytes of them
├── PinRefused           pinned adapters would take more of the pool than they may
├── InvalidAdapterName   the name cannot be used, whatever the adapter
├── BaseNameTaken        a stored adapter has the name that the base is to be served by
├── AdapterRefused       the adapter cannot be served exactly; every reason is listed
├── InvalidUpload        the files received are not a readable PEFT folder or archive of one
├── SelfTestFailed       what was packed does not compute what was uploaded: our fault
├── UploadTooLarge       more bytes than one upload may have
├── SourceForbidden      the server may not read from there
├── SourceUnsupported    nothing installed here can read from there
├── SourceFailed         the source did not give the adapter
├── DigestMismatch       what came is not what the SHA-256 says
└── StorageFailed        the data folder, its database or its disk does not work
"""

from __future__ import annotations

from loraplex_server.adapters.report import ReadingReport


class AdapterError(Exception):
    """Base of everything this package raises on purpose."""


class AdapterNotFound(AdapterError):
    """No adapter is registered under `name` for the served base model."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"no adapter is named {name!r}")


class AdapterNameTaken(AdapterError):
    """`name` is registered with other content, which stays as it is."""

    def __init__(self, name: str, current_id: str) -> None:
        self.name = name
        self.details = {"current_id": current_id}
        super().__init__(
            f"the name {name!r} belongs to an adapter with other content; replace that one "
            "(`replace`), delete it first, or choose another name"
        )


class VersionConflict(AdapterError):
    """`name` stands for `current_id` (None: nothing), not for what was expected."""

    def __init__(self, name: str, expected_id: str, current_id: str | None) -> None:
        self.name = name
        self.details = {"current_id": current_id}
        current = "does not exist" if current_id is None else f"stands for {current_id}"
        super().__init__(f"{name!r} {current}, not for {expected_id}; nothing was changed")


class AmbiguousVersion(AdapterError):
    """Several versions of a name have ids that begin with what was given."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"{reference!r} names several versions; give more digits")


class VersionIsCurrent(AdapterError):
    """The version that the name stands for was to be deleted by itself."""

    def __init__(self, name: str, current_id: str) -> None:
        self.details = {"current_id": current_id}
        super().__init__(
            f"{name!r} stands for this version: roll back to another one first, or delete the name"
        )


class AdapterNotOwned(AdapterError):
    """`name` is another's to change, or everybody's."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name!r} is not an adapter of your tenant; its owner or an admin can change it"
        )


class OwnerHasEnough(AdapterError):
    """The owner of the name may not have more adapters, or more bytes of them; says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class PinRefused(AdapterError):
    """Pinned adapters would take `num_pages` of the pool, and may take `max_pages`."""

    def __init__(self, name: str, num_pages: int, max_pages: int) -> None:
        self.details = {"pages": num_pages, "max_pages": max_pages}
        super().__init__(
            f"with {name!r}, pinned adapters would take {num_pages} pages of the pool and may take "
            f"{max_pages}; unpin others, or give the server a larger pool or pinned_share"
        )


class InvalidAdapterName(AdapterError):
    """`name` breaks a rule of adapter names; `reason` says which."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"adapter name {name[:140]!r}: {reason}")


class BaseNameTaken(AdapterError):
    """The stored adapter `name` has the name that the base is to be served by; at start-up."""

    def __init__(self, name: str, base_name: str) -> None:
        self.name = name
        super().__init__(
            f"the adapter {name!r} has the base model's name {base_name!r}, and requests could "
            "not tell them apart; serve the base by another --served-model-name, and to have this "
            f"one, delete the adapter then: loraplex adapters rm {name}"
        )


class AdapterRefused(AdapterError):
    """Serving this adapter would not give what PEFT computes.

    `reasons` is the whole list; `report` accounts for every field and tensor, where a reader made
    one.
    """

    def __init__(
        self,
        reasons: tuple[str, ...],
        name: str | None = None,
        report: ReadingReport | None = None,
    ) -> None:
        self.reasons = reasons
        self.name = name
        self.report = report
        label = f"adapter {name!r}" if name else "the adapter"
        super().__init__(f"{label} is refused: " + "; ".join(reasons))


class InvalidUpload(AdapterError):
    """What was received is not an adapter folder; `reason` says what to send instead."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class UploadTooLarge(AdapterError):
    """The upload, or what its archive unpacks to, passes `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"the upload is larger than the limit of {limit_bytes} bytes")


class SelfTestFailed(AdapterError):
    """The packed adapter's outputs are off by `error`, relative to what they sum up."""

    def __init__(self, error: float, bound: float) -> None:
        self.error = error
        super().__init__(
            f"the self-test failed: as packed for the memory pool, the adapter's outputs are off "
            f"by {error:.1e} (at most {bound:.0e} is rounding); this is no fault of the adapter "
            "but a bug of the server or damaged memory: please report it; nothing was registered"
        )


class SourceForbidden(AdapterError):
    """The server's settings do not let it read from there; `reason` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class SourceUnsupported(AdapterError):
    """Nothing that is installed here can read from there."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class SourceFailed(AdapterError):
    """The source did not give the adapter: it is not there, not open to us, or the way is cut."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class DigestMismatch(AdapterError):
    """What came from the source is not what the request's SHA-256 says."""

    def __init__(self, expected: str, found: str) -> None:
        self.details = {"sha256": found}
        super().__init__(f"the source's SHA-256 is {found}, not {expected}; nothing was registered")


class StorageFailed(AdapterError):
    """The storage refused an operation; nothing was registered, and `reason` says what to do."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
