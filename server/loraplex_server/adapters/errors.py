"""Errors of the adapter catalogue.

AdapterError
├── AdapterNotFound      no adapter has this name
├── AdapterNameTaken     the name belongs to an adapter with other content
├── InvalidAdapterName   the name cannot be used, whatever the adapter
├── BaseNameTaken        a stored adapter has the name that the base is to be served by
├── AdapterRefused       the adapter cannot be served exactly; every reason is listed
├── InvalidUpload        the files received are not a readable PEFT folder or archive of one
├── UploadTooLarge       more bytes than one upload may have
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

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"the name {name!r} belongs to an adapter with other content; "
            "delete that one first or choose another name"
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


class StorageFailed(AdapterError):
    """The storage refused an operation; nothing was registered, and `reason` says what to do."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
