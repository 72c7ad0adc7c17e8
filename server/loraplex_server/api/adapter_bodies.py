"""What `/v1/adapters` is sent, apart from files, and what it answers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.adapters.record import EVERYBODY, AdapterRecord
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.validation import Validation
from loraplex_server.api.pool_map import Tiers
from loraplex_server.tenants.principal import is_tenant_name

_ModelT = TypeVar("_ModelT", bound=BaseModel)

#: A hundred years.
MAX_TTL_S: Final = 3_155_760_000

_MAX_READERS: Final = 256


def _check_readers(readers: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [name for name in readers if name != EVERYBODY and not is_tenant_name(name)]:
        raise ValueError(f"no tenant can be called {wrong[0][:64]!r}; give tenants, or *")
    return tuple(dict.fromkeys(readers))


#: Tenants, or `*`; null for the rule.
Readers = Annotated[
    Annotated[tuple[str, ...], Field(max_length=_MAX_READERS), AfterValidator(_check_readers)]
    | None,
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]

TtlS = Annotated[int, Field(ge=1, le=MAX_TTL_S)]
_Id = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class AdapterOptions(_Strict):
    """What goes with an adapter, however it comes."""

    check_base: bool = True
    replace: bool = False
    expected_id: _Id | None = None
    ttl_s: TtlS | None = None
    defaults: AdapterDefaults = Field(default_factory=AdapterDefaults)

    @model_validator(mode="after")
    def _check_expected(self) -> AdapterOptions:
        if self.expected_id is not None and not self.replace:
            raise ValueError("expected_id is what `replace` may replace; set `replace` too")
        return self

    def settings(self) -> dict[str, Any]:
        """Return those of the name's settings that were given."""
        given = self.model_fields_set & {"ttl_s", "defaults"}
        return {name: getattr(self, name) for name in given}

    def registration_of(self, name: str, source: str) -> Registration:
        """Return the wish, whose owner and actor are for others to fill in."""
        return Registration(
            name=name,
            check_base=self.check_base,
            replace=self.replace,
            expected_id=self.expected_id,
            source=source,
            settings=self.settings(),
        )


class SourceBody(AdapterOptions):
    """An adapter that the server is to fetch."""

    name: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-fA-F]{64}$")] | None = None

    @property
    def digits(self) -> str | None:
        """The SHA-256 without its prefix, in lower case."""
        return None if self.sha256 is None else self.sha256.removeprefix("sha256:").lower()

    def registration(self, public_url: str) -> Registration:
        return self.registration_of(self.name, public_url)


class SettingsBody(_Strict):
    """What is to change of a name's settings; fields that are not given stay."""

    pinned: bool = False
    ttl_s: TtlS | None = None
    defaults: AdapterDefaults = Field(default_factory=AdapterDefaults)
    readers: Readers = None

    @model_validator(mode="after")
    def _check_any(self) -> SettingsBody:
        if not self.model_fields_set:
            raise ValueError("give at least one of `pinned`, `ttl_s`, `defaults`, `readers`")
        return self

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class RollbackBody(_Strict):
    """Which version is to be current again."""

    id: str | None = None
    version: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> RollbackBody:
        if (self.id is None) == (self.version is None):
            raise ValueError("give either `id` or `version`")
        return self


def parse_body(model: type[_ModelT], values: Any) -> _ModelT:
    """Return `values` as `model`.

    Raises:
        RequestValidationError: answered as the one of a JSON body that FastAPI reads.
    """
    try:
        # As JSON, where lists stand for tuples.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [{**e, "loc": ("body", *e["loc"])} for e in error.errors()]
        raise RequestValidationError(problems) from error


def record_body(record: AdapterRecord, tiers: Tiers) -> dict[str, Any]:
    """Return the JSON of one version."""
    tier = tiers.of(record.id)
    return {
        "object": "adapter",
        "name": record.name,
        "id": record.id,
        "version": record.version,
        "current": record.is_current,
        "base_model": record.base_model,
        "rank_max": record.rank_max,
        "target_modules": list(record.target_modules),
        "size_bytes": record.size_bytes,
        "native_bytes": record.native_bytes,
        "pool_pages": record.pool_pages,
        "self_test_error": record.self_test_error,
        "source": record.source,
        "created": record.created,
        "last_used": record.last_used,
        "pinned": record.settings.pinned,
        "ttl_s": record.settings.ttl_s,
        "defaults": record.defaults.to_json(),
        "owner": record.owner,
        "readers": list(record.readers),
        "state": "registered" if tier == "disk" else tier,
    }


def validation_body(validation: Validation) -> dict[str, Any]:
    """Return the JSON of a judgement."""
    fields = validation.to_json()
    is_valid = fields.pop("accepted")
    return {"object": "adapter.validation", "valid": is_valid, **fields}
