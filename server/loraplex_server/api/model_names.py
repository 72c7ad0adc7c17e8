"""Who shall answer a request, in the several ways that servers have of saying it.

`model` names the base model, an adapter, one version of an adapter (`name@sha256:...`), or, where
nothing else has that name, `base:adapter` as SGLang writes it. `adapter_id` (LoRAX) and `lora_path`
(SGLang) name an adapter beside the base's name in `model`, and `adapters` several with weights. Two
fields that do not mean the same are an error, never a matter of precedence: whoever reads the
answer must know who gave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.api.adapter_access import AdapterAccess
from loraplex_server.api.errors import InvalidRequest, ModelNotFound
from loraplex_server.api.job import WeightedAdapter
from loraplex_server.tenants.namespace import Namespace


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
class ModelWish:
    """All that a request says of who shall answer.

    Attributes:
        namings: the fields that name one.
        mixture: names and weights of several adapters, instead.
        scale: factor on all that the one adapter adds; None is 1.
    """

    namings: tuple[Naming, ...]
    mixture: tuple[tuple[str, float], ...] = ()
    scale: float | None = None


@dataclass(frozen=True)
class Answerer:
    """Who answers a request.

    Attributes:
        adapters: their leases are the receiver's to release; none is the base model.
        name: what the answer calls it: as the request did.
    """

    adapters: tuple[WeightedAdapter, ...]
    name: str

    @property
    def record(self) -> AdapterRecord | None:
        """Whose defaults apply: the first adapter's."""
        return self.adapters[0].lease.record if self.adapters else None

    def release(self) -> None:
        """Give the leases back; blocks. Idempotent."""
        for adapter in self.adapters:
            adapter.lease.release()


class ModelNames:
    """Resolves names, each once for a whole request; immutable, used from any thread."""

    def __init__(self, access: AdapterAccess, base_names: Sequence[str]) -> None:
        self._access = access
        self._base_names = tuple(base_names)

    def is_base(self, name: str) -> bool:
        """Whether `name` is the base model's; no adapter can have it."""
        return not name or name in self._base_names

    def base(self, wish: ModelWish) -> Answerer | None:
        """Return the base model if it is plainly named; does not block.

        Raises:
            InvalidRequest: it is to be scaled.
        """
        if wish.mixture or not all(self.is_base(naming.name) for naming in wish.namings):
            return None
        if wish.scale is not None:
            raise InvalidRequest(
                "`adapter_scale` is a factor on what an adapter adds; name one",
                param="adapter_scale",
            )
        return Answerer((), self._base_name(wish))

    def try_acquire(self, wish: ModelWish, namespace: Namespace) -> Answerer | None:
        """Return who shall answer if that is one adapter that is known here; does not block.

        Returns:
            None where `acquire` must be asked.
        """
        telling = self._telling(wish)
        if wish.mixture or wish.scale is not None or len(telling) != 1:
            return None
        lease = self._access.try_acquire(namespace, telling[0].name)
        return Answerer((WeightedAdapter(lease),), telling[0].name) if lease else None

    def acquire(self, wish: ModelWish, namespace: Namespace) -> Answerer:
        """Return who shall answer; blocks (SQL, a remote store).

        Args:
            namespace: which adapters whoever asks may name.

        Raises:
            ModelNotFound: a name that nobody has whom that one may name; `param` is its field.
            InvalidRequest: two fields name different ones, or one cannot be weighted.
            AdapterError: see `AdapterCatalog.acquire`.
        """
        if (base := self.base(wish)) is not None:
            return base
        acquire = self._acquire_mixture if wish.mixture else self._acquire_named
        answerer = acquire(wish, namespace)
        try:
            _check_weights(answerer, "adapters" if wish.mixture else "adapter_scale")
        except InvalidRequest:
            answerer.release()
            raise
        return answerer

    def _base_name(self, wish: ModelWish) -> str:
        return next((naming.name for naming in wish.namings if naming.name), self._base_names[0])

    def _telling(self, wish: ModelWish) -> list[Naming]:
        """Return the fields that decide: `model` does not where it is the base's name."""
        return [n for n in wish.namings if n.param != "model" or not self.is_base(n.name)]

    # ---- one adapter, however often it is named ----------------------------------------------

    def _acquire_named(self, wish: ModelWish, namespace: Namespace) -> Answerer:
        first, *others = self._telling(wish)
        answerer = self._acquire_one(first, namespace)
        try:
            for other in others:
                self._check_same(first, answerer, other, namespace)
        except BaseException:
            answerer.release()
            raise
        if wish.scale is None:
            return answerer
        scaled = tuple(replace(adapter, weight=wish.scale) for adapter in answerer.adapters)
        return replace(answerer, adapters=scaled)

    def _check_same(
        self, first: Naming, answerer: Answerer, other: Naming, namespace: Namespace
    ) -> None:
        second = self._acquire_one(other, namespace)
        second.release()
        if _identity(answerer) != _identity(second):
            raise InvalidRequest(
                f"`{first.param}` names {_quoted(first.name)}, and `{other.param}` names "
                f"{_quoted(other.name)}; a request is answered by one of them",
                param=other.param,
            )

    def _acquire_one(self, naming: Naming, namespace: Namespace) -> Answerer:
        if self.is_base(naming.name):
            return Answerer((), naming.name)
        for reference in self._readings(naming):
            try:
                lease = self._access.acquire(namespace, reference)
            except AdapterNotFound:
                continue
            return Answerer((WeightedAdapter(lease),), naming.name)
        raise ModelNotFound(naming.name, param=naming.param)

    def _readings(self, naming: Naming) -> Iterator[str]:
        """Return what the name can mean, best first.

        An adapter whose own name has the colon comes first. Nothing but the whole name of the base
        model is a prefix: other names with a colon are just names.
        """
        yield naming.name
        if not naming.param.startswith("model"):  # nor one of `models`
            return
        prefixes = [f"{base}:" for base in self._base_names if naming.name.startswith(f"{base}:")]
        for prefix in sorted(prefixes, key=len, reverse=True):
            if rest := naming.name.removeprefix(prefix):
                yield rest

    # ---- several adapters with weights -------------------------------------------------------

    def _acquire_mixture(self, wish: ModelWish, namespace: Namespace) -> Answerer:
        self._check_mixture(wish)
        adapters: list[WeightedAdapter] = []
        try:
            for index, (name, weight) in enumerate(wish.mixture):
                naming = Naming(f"adapters[{index}].name", name)
                lease = self._acquire_one(naming, namespace).adapters[0].lease
                adapters.append(WeightedAdapter(lease, weight))
        except BaseException:
            Answerer(tuple(adapters), "").release()
            raise
        return Answerer(tuple(adapters), self._base_name(wish))

    def _check_mixture(self, wish: ModelWish) -> None:
        for other in self._telling(wish):
            raise InvalidRequest(
                f"`{other.param}` names {_quoted(other.name)}, and `adapters` a mixture; a request "
                "is answered by one of them",
                param="adapters",
            )
        if wish.scale is not None:
            raise InvalidRequest(
                "`adapter_scale` goes with one adapter; in `adapters`, give the weights",
                param="adapter_scale",
            )
        names = [name for name, _ in wish.mixture]
        for index, name in enumerate(names):
            param = f"adapters[{index}].name"
            if self.is_base(name):
                raise InvalidRequest("the base model takes part in any case", param=param)
            if name in names[:index]:
                raise InvalidRequest(f"{_quoted(name)} is named twice", param=param)


def _check_weights(answerer: Answerer, param: str) -> None:
    """Raise InvalidRequest where an adapter is weighted or mixed that cannot be."""
    if len(answerer.adapters) == 1 and answerer.adapters[0].weight == 1.0:
        return
    for adapter in answerer.adapters:
        record = adapter.lease.record
        if not record.spec.is_additive:
            raise InvalidRequest(
                f"the adapter {_quoted(record.name)} does more than add to linears, so it can be "
                "neither scaled nor mixed with others",
                param=param,
            )


def _identity(answerer: Answerer) -> tuple[str, str] | None:
    record = answerer.record
    return (record.name, record.id) if record else None


def _quoted(name: str) -> str:
    return f"`{name}`" if name else "the base model"
