"""One adapter folder, opened for a reader: fields and tensors, each looked at once and accounted.

Faults go to the ledger and do not raise, so that one answer lists them all. A tensor that cannot
be used is answered by zeros of the shape that was asked for, which cost no memory as long as they
are not converted. So a reader first takes everything, then, before it computes anything, gives up
`if folder.ledger`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from loraplex_memory.layout import ModelGeometry
from loraplex_server.adapters.formats.config_fields import ConfigFields
from loraplex_server.adapters.formats.ledger import Ledger
from loraplex_server.adapters.formats.linears import (
    PREFIX,
    Linear,
    doubled,
    explain_tensor,
    parse_linear,
)
from loraplex_server.adapters.peft_targets import TargetRule
from loraplex_server.adapters.record import AdapterLimits

_FLOATS: Final = ("F32", "F16", "BF16")
_INTS: Final = ("I64", "I32", "I16", "U8")
#: Elements of any tensor that could be meant; far below what torch can count.
_MAX_ELEMENTS: Final = 1 << 40


@dataclass(frozen=True)
class LinearTensors:
    """What the file holds for one linear: tensor names by what stands behind the module's name."""

    linear: Linear
    names: Mapping[str, str]


class PeftFolder:
    """Owned by one reading; tensors are mapped from the file and stay valid as long as it is."""

    def __init__(
        self,
        file: Any,
        config: ConfigFields,
        geometry: ModelGeometry,
        limits: AdapterLimits,
        ledger: Ledger,
    ) -> None:
        """Args:
        file: what `safetensors.safe_open` gives.
        """
        self.config = config
        self.geometry = geometry
        self.limits = limits
        self.ledger = ledger
        self._file = file
        self._keys: tuple[str, ...] = tuple(sorted(file.keys()))
        self._known = frozenset(self._keys)

    def keys(self) -> tuple[str, ...]:
        """Return the names of all tensors, ascending."""
        return self._keys

    def has(self, name: str) -> bool:
        return name in self._known

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape, by the header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def is_untouched(self, name: str) -> bool:
        """Whether nobody has taken, ignored or refused the tensor yet."""
        return not self.ledger.has_verdict("tensor", name)

    def take(
        self, name: str, shape: Sequence[int] | None = None, *, fold: str | None = None
    ) -> torch.Tensor:
        """Return a tensor of floats, in its stored dtype, and count it as applied or folded.

        Args:
            shape: what it must be; None takes any.
            fold: how it is converted; None where it is used as it is.

        Raises:
            AdapterRefused: there is a fault, and the shape that was asked for is absurd.
        """
        return self._take(name, shape, fold, _FLOATS)

    def take_ints(
        self, name: str, shape: Sequence[int] | None = None, *, fold: str | None = None
    ) -> torch.Tensor:
        """Return a tensor of indices, in its stored dtype; else as `take`.

        To be converted before it indexes: torch takes bytes for a mask.
        """
        return self._take(name, shape, fold, _INTS)

    def ignore(self, name: str, why: str) -> None:
        """Count a tensor as one that cannot change an output."""
        self.ledger.tensor(name, "no effect", why)

    def refuse(self, name: str, reason: str) -> None:
        """Refuse the adapter because of a tensor."""
        self.ledger.refuse(reason, name, kind="tensor")

    def check_rank(self, rank: int, module: str, *, what: str = "rank") -> bool:
        """Refuse a stored or folded rank above the limit, before anything is computed with it."""
        if rank > self.limits.max_rank:
            limit = self.limits.max_rank
            self.ledger.refuse(f"{what} {rank} is above the limit of {limit}", module)
        return rank <= self.limits.max_rank

    def check_dense(self, num_bytes: int, what: str) -> bool:
        """Refuse a dense part above the limit, before anything is computed with it."""
        fault = dense_fault(num_bytes, what, self.limits)
        if fault is not None:
            self.ledger.refuse(fault)
        return fault is None

    def linears(
        self,
        suffixes: Collection[str],
        *,
        required: Collection[str] | None = None,
        rule: TargetRule | None = None,
    ) -> list[LinearTensors]:
        """Group the tensors `base_model.model.{linear}.{suffix}` by linear, in order of names.

        Left out, and refused: a linear of a layer that the base does not have, one that lacks a
        required suffix, and one that the rule leaves out. Refused: one given both fused and split.

        Args:
            suffixes: `lora_A.weight` and the like.
            required: those that every linear must have; by default all.
            rule: the modules that PEFT would put an adapter on; by default any.

        Raises:
            PatternError: a pattern of the rule costs too much to match.
        """
        groups: dict[str, dict[str, str]] = {}
        linears: dict[str, Linear] = {}
        for name in self._keys:
            suffix = next((s for s in suffixes if name.endswith(f".{s}")), None)
            if suffix is None or not name.startswith(PREFIX):
                continue
            module = name[len(PREFIX) : -len(suffix) - 1]
            linear = linears.get(module) or parse_linear(module)
            if linear is not None:
                linears[module] = linear
                groups.setdefault(module, {})[suffix] = name
        needed = suffixes if required is None else required
        found = [
            LinearTensors(linears[module], names)
            for module, names in groups.items()
            if self._is_complete(linears[module], names, needed, rule)
        ]
        for linear in doubled([group.linear for group in found]):
            self.ledger.refuse("given both fused and split", linear.module)
        return found

    def finish(self) -> None:
        """Refuse by name every tensor that nobody has taken or ignored."""
        for name in self._keys:
            if not self.is_untouched(name):
                continue
            if self.ledger.has_verdict("adapter", self._module_of(name)):
                self.ledger.tensor(name, "refused", "not read, as its module is refused")
            else:
                self.refuse(name, explain_tensor(name))

    def _take(
        self, name: str, shape: Sequence[int] | None, fold: str | None, dtypes: Sequence[str]
    ) -> torch.Tensor:
        fault = self._header_fault(name, shape, dtypes)
        if fault is None:
            tensor: torch.Tensor = self._file.get_tensor(name)
            if is_finite(tensor):
                self.ledger.tensor(name, "folded" if fold else "applied", fold or "")
                return tensor
            fault = "holds NaN or infinity"
        self.refuse(name, fault)
        stand_in = shape if shape is not None else self.shape(name) if self.has(name) else (0,)
        if _num_elements(stand_in) > _MAX_ELEMENTS:
            self.ledger.raise_if_any()
        return torch.zeros(()).expand(tuple(stand_in))

    def _header_fault(
        self, name: str, shape: Sequence[int] | None, dtypes: Sequence[str]
    ) -> str | None:
        if not self.has(name):
            return "is missing"
        dtype = str(self._file.get_slice(name).get_dtype())
        if dtype not in dtypes:
            known = (
                "float32, float16 and bfloat16" if dtypes is _FLOATS else "int64 to int16 and uint8"
            )
            return f"is {dtype}; only {known} are read"
        stored = self.shape(name)
        if _num_elements(stored) > _MAX_ELEMENTS:
            return f"is {list(stored)}, which is no shape of a tensor"
        if shape is not None and stored != tuple(shape):
            side = name.removesuffix(".weight").rpartition(".")[2]
            return (
                f"{side} is {list(stored)} where the configuration and the base need {list(shape)}"
            )
        return None

    def _is_complete(
        self,
        linear: Linear,
        names: Mapping[str, str],
        needed: Collection[str],
        rule: TargetRule | None,
    ) -> bool:
        fault = self._group_fault(linear, names, needed, rule)
        if fault is not None:
            self.ledger.refuse(fault, linear.module)
            for name in names.values():
                self.ledger.tensor(name, "refused", fault)
        return fault is None

    def _group_fault(
        self,
        linear: Linear,
        names: Mapping[str, str],
        needed: Collection[str],
        rule: TargetRule | None,
    ) -> str | None:
        missing = [suffix for suffix in needed if suffix not in names]
        if missing:
            return f"has no {missing[0].removesuffix('.weight')}"
        if linear.layer >= self.geometry.num_layers:
            return f"the base has only {self.geometry.num_layers} layers"
        if rule is not None and not rule.covers(linear.module, linear.layer):
            return (
                "has tensors, but target_modules and the fields beside it leave it out, so PEFT "
                "would not load them"
            )
        return None

    @staticmethod
    def _module_of(name: str) -> str:
        """Return the linear that a tensor's name begins with, or else a name of nothing."""
        module = ".".join(name.removeprefix(PREFIX).split(".")[:5])
        return module if parse_linear(module) else name


def dense_fault(num_bytes: int, what: str, limits: AdapterLimits) -> str | None:
    """Return why dense parts of this size, `what` names them, are refused, if they are."""
    if num_bytes <= limits.max_dense_bytes:
        return None
    return (
        f"{what}: {show_bytes(num_bytes)} folded, above the limit of "
        f"{show_bytes(limits.max_dense_bytes)} for embeddings, heads, rows of tokens and prompts "
        "of one adapter; train LoRA on these modules, or less of them"
    )


def _num_elements(shape: Sequence[int]) -> int:
    """Return the elements of a tensor of this shape, with 1 for every size of 0."""
    return math.prod(max(1, size) for size in shape)


def show_bytes(num_bytes: int) -> str:
    """Return a size for a message."""
    return f"{num_bytes / (1 << 20):.1f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether `tensor` holds no NaN and no infinity; one pass, no copy."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
