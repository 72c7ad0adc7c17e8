"""Who shall answer a request, in the several ways that servers have of saying it.

`model` names the base model, an adapter, one version of an adapter (`name@sha256:...`), or, where
nothing else has that name, `base:adapter` as SGLang writes it. `adapter_id` (LoRAX) and `lora_path`
(SGLang) name an adapter beside the base's name in `model`. Two fields that do not mean the same are
an error, never a matter of precedence: whoever reads the answer must know who gave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.api.errors import InvalidRequest, ModelNotFound


@dataclass(frozen=True)
class Naming:
    """One field of a request that says who shall answer.

    Attributes:
        param: the field.
        name: its value; "" is the base model.
    """

    param: str
    name: str


@dataclass(frozen=True)
class Answerer:
    """Who answers a request.

    Attributes:
        lease: on the adapter, the receiver's to release; None is the base model.
        name: what the answer calls it: as the request did.
    """

    lease: AdapterLease | None
    name: str

    def release(self) -> None:
        """Give the lease back; blocks. Idempotent."""
        if self.lease is not None:
            self.lease.release()


class ModelNames:
    """Resolves names, each once for a whole request; immutable, used from any thread."""

    def __init__(self, catalog: AdapterCatalog, base_names: Sequence[str]) -> None:
        self._catalog = catalog
        self._base_names = tuple(base_names)

    def is_base(self, name: str) -> bool:
        """Whether `name` is the base model's; no adapter can have it."""
        return not name or name in self._base_names

    def base(self, namings: Sequence[Naming]) -> Answerer | None:
        """Return the base model if it is plainly named; does not block."""
        if all(self.is_base(naming.name) for naming in namings):
            given = next((naming.name for naming in namings if naming.name), self._base_names[0])
            return Answerer(None, given)
        return None

    def acquire(self, namings: Sequence[Naming]) -> Answerer:
        """Return who shall answer; blocks (SQL, a remote store).

        Raises:
            ModelNotFound: a name that nobody has; `param` is its field.
            InvalidRequest: two fields name different ones.
            AdapterError: see `AdapterCatalog.acquire`.
        """
        if (base := self.base(namings)) is not None:
            return base
        telling = [n for n in namings if not (n.param == "model" and self.is_base(n.name))]
        first = self._acquire_one(telling[0])
        try:
            for other in telling[1:]:
                self._check_same(telling[0], first, other)
        except BaseException:
            first.release()
            raise
        return first

    def _check_same(self, first: Naming, answerer: Answerer, other: Naming) -> None:
        second = self._acquire_one(other)
        second.release()
        if _identity(answerer) == _identity(second):
            return
        raise InvalidRequest(
            f"`{first.param}` names {_quoted(first.name)}, and `{other.param}` names "
            f"{_quoted(other.name)}; a request is answered by one of them",
            param=other.param,
        )

    def _acquire_one(self, naming: Naming) -> Answerer:
        if self.is_base(naming.name):
            return Answerer(None, naming.name)
        for reference in self._readings(naming):
            try:
                return Answerer(self._catalog.acquire(reference), naming.name)
            except AdapterNotFound:
                continue
        raise ModelNotFound(naming.name, param=naming.param)

    def _readings(self, naming: Naming) -> Iterator[str]:
        """Return what the name can mean, best first.

        An adapter whose own name has the colon comes first. Nothing but the whole name of the base
        model is a prefix: other names with a colon are just names.
        """
        yield naming.name
        if naming.param != "model":
            return
        prefixes = [f"{base}:" for base in self._base_names if naming.name.startswith(f"{base}:")]
        for prefix in sorted(prefixes, key=len, reverse=True):
            if rest := naming.name.removeprefix(prefix):
                yield rest


def _identity(answerer: Answerer) -> tuple[str, str] | None:
    record = answerer.lease.record if answerer.lease else None
    return (record.name, record.id) if record else None


def _quoted(name: str) -> str:
    return f"`{name}`" if name else "the base model"
