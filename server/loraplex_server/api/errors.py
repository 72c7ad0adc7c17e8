"""The errors that only HTTP knows. What each looks like to a client: `error_table`.

ApiError
├── InvalidRequest           a field is unknown, missing, of a wrong type or not supported
├── ModelNotFound            `model` names neither the base model nor an adapter
├── AdapterMissing           an endpoint of another server's names an adapter that is not there
├── ContextLengthExceeded    prompt and answer do not fit the model
├── InvalidApiKey            no key, or not one of the server's
├── RoleRequired             the key's role does not allow this
├── TenantForbidden          the request asks for what is another tenant's
├── CrossSiteRefused         a web page of another site wants to change something
├── TooManyUploads           more uploads are open than the server receives at once
├── UploadStalled            nothing came of an upload for too long
├── AdapterDraining          requests still run on an adapter that was deleted
├── AdapterDeleted           the request was cancelled because its adapter was deleted
├── InvalidTenant            the header that names the tenant holds no name
├── QuotaTooSmall            the request alone needs more tokens than its tenant gets in a minute
├── Overloaded               not now: the engine could not answer in time
│   ├── QueueFull            more requests wait than the server accepts
│   ├── TenantQueueFull      more of the tenant's requests wait than one tenant may have waiting
│   ├── RequestQuotaExceeded  the tenant's requests of this minute are spent
│   └── QuotaExceeded        the tenant's tokens of this minute are spent
├── RequestTimedOut          no complete answer within `request_timeout_s`
│   └── DeadlineExceeded     no complete answer within the request's own `deadline_s`
├── ServerStopping           the server ended the request because it shuts down
└── GenerationFailed         the engine could not complete the request
"""

from __future__ import annotations

from typing import Final

from loraplex_server.tenants.principal import Role


class ApiError(Exception):
    """Base of the errors that only HTTP knows; `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class InvalidRequest(ApiError):
    """A field is unknown, missing, of a wrong type or not supported."""


class ModelNotFound(ApiError):
    """`model`, or another field `param`, names neither the base model nor an adapter."""

    def __init__(self, name: str, *, param: str = "model") -> None:
        super().__init__(
            f"The model `{name[:256]}` does not exist. GET /v1/models lists those that do.",
            param=param,
        )


class AdapterMissing(ApiError):
    """There is no such adapter, in the words of the server whose endpoint was called."""


class ContextLengthExceeded(ApiError):
    """Prompt and answer do not fit the model; the message has the numbers."""


class InvalidApiKey(ApiError):
    """The request brought no key, or not one of the server's."""


class RoleRequired(ApiError):
    """The key's role does not allow this."""

    def __init__(self, needed: Role, given: Role) -> None:
        super().__init__(
            f"this needs a key of the role {needed.value}, and yours is {given.value}; an admin "
            f"can make one: loraplex keys create --role {needed.value}"
        )


class TenantForbidden(ApiError):
    """The request asks for what is another tenant's, or an admin's; the message says what."""


class CrossSiteRefused(ApiError):
    """A web page of another site wants to change something here."""


class TooManyUploads(ApiError):
    """More uploads are open than the server receives at once."""

    retry_after_s: Final = 5.0


class UploadStalled(ApiError):
    """Nothing came of an upload for too long."""


class AdapterDraining(ApiError):
    """Requests still run on an adapter whose name is gone; its memory is freed when they end."""

    def __init__(self, name: str, timeout_s: float, num_users: int) -> None:
        self.details = {"deleted": True, "running": num_users}
        super().__init__(
            f"{name!r} is deleted, but requests still run on it after {timeout_s:g} s "
            f"({num_users}); what it takes is freed when they end"
        )


class AdapterDeleted(ApiError):
    """The request was cancelled because its adapter was deleted."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the adapter {name!r} was deleted while it answered", param="model")


class InvalidTenant(ApiError):
    """The header that names the tenant holds no name."""


class QuotaTooSmall(ApiError):
    """The request alone needs more tokens than its tenant gets in a minute."""


class Overloaded(ApiError):
    """Too much is asked for now, which may be granted `retry_after_s` seconds from now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class QueueFull(Overloaded):
    """More requests wait than the server accepts."""


class TenantQueueFull(Overloaded):
    """More of the tenant's requests wait than one tenant may have waiting."""


class QuotaExceeded(Overloaded):
    """The tenant's tokens of this minute are spent."""


class RequestQuotaExceeded(Overloaded):
    """The tenant's requests of this minute are spent."""


class RequestTimedOut(ApiError):
    """No complete answer within the time a request may take."""


class DeadlineExceeded(RequestTimedOut):
    """No complete answer within the time that the request itself set."""


class ServerStopping(ApiError):
    """The server ended the request because it shuts down."""

    retry_after_s: Final = 5.0


class GenerationFailed(ApiError):
    """The engine could not complete the request."""
