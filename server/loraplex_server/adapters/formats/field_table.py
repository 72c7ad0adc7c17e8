"""What becomes of every field of one PEFT configuration class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from loraplex_server.adapters.formats.config_fields import ConfigFields

_CONV1D: Final = "is for Conv1D models; save the adapter again with false"
#: Which linears have an adapter; `ConfigFields.target_rule` reads them.
_TARGETS: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class FieldTable:
    """The fields of one class, but those that all classes have.

    Attributes:
        applied: a reader reads them.
        without_effect: cannot change an output; why.
        unsupported: must be off; what it is and the nearest way out.
    """

    applied: frozenset[str]
    without_effect: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """All fields of the table."""
        return self.applied | self.without_effect.keys() | self.unsupported.keys()

    def account(self, fields: ConfigFields) -> None:
        """Account for all fields that no reader reads."""
        fields.without_effect(self.without_effect)
        fields.must_be_off(self.unsupported)


def linear_fields(
    *applied: str,
    without: Collection[str] = (),
    no_effect: Mapping[str, str] | None = None,
    unsupported: Mapping[str, str] | None = None,
) -> FieldTable:
    """Return the table of a class whose adapters sit on linears.

    Args:
        applied: its own fields, beside those that choose modules, `bias` and `modules_to_save`.
        without: fields of such classes that this one does not have.
        no_effect: its own fields that cannot change an output.
    """
    shared = {*_TARGETS, "bias", "modules_to_save"} - set(without)
    has_init = "init_weights" not in {*applied, *without}
    init = {"init_weights": "initialisation only"} if has_init else {}
    off = {"fan_in_fan_out": _CONV1D} if "fan_in_fan_out" not in without else {}
    return FieldTable(
        applied=frozenset(shared | set(applied)),
        without_effect={**init, **(no_effect or {})},
        unsupported={**off, **(unsupported or {})},
    )


def dropout(*names: str) -> dict[str, str]:
    """Return the entries of fields that only training reads."""
    return dict.fromkeys(names, "training only")
