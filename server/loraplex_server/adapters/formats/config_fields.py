"""Configuration fields, read by typed getters that account for each of them.

Invariant: a field is read by a getter (applied), is noted as without effect or as refused, or is
off; `finish` refuses every other one by name. After a fault a getter returns its default, so that
the rest can be checked too and one answer lists everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from loraplex_server.adapters.formats.ledger import Ledger
from loraplex_server.adapters.formats.rank_rule import RankRule
from loraplex_server.adapters.peft_pattern import ModulePattern, PatternError, StepBudget
from loraplex_server.adapters.peft_targets import ModuleChoice, TargetRule

_MAX_PATTERNS: Final = 20_000
_MAX_NUMBER: Final = 1e30
_OFF: Final = "off"
_Choice = TypeVar("_Choice", bound=str)

#: Fields of every PEFT configuration that cannot change what the adapter computes.
_COMMON: Final[Mapping[str, str]] = {
    "auto_mapping": "names the Python class of the base",
    "peft_version": "provenance",
    "revision": "provenance of the base",
    "inference_mode": "how PEFT loads it",
}


def is_off(value: object) -> bool:
    """Whether a configuration value is what PEFT writes for an option nobody switched on."""
    return value is None or value is False or value in ("", [], {})


class ConfigFields:
    """One parsed configuration; owned by the reading of its adapter."""

    def __init__(self, config: Mapping[str, Any], ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._budget = StepBudget()

    def raw(self, field: str, default: Any = None) -> Any:
        """Return the value as it is, and count it as applied, or off; the caller checks it."""
        if self.is_on(field):
            self._ledger.field(field, "applied")
        elif field in self._config:
            self._ledger.field(field, "no effect", _OFF)
        return self._config.get(field, default)

    def peek(self, field: str) -> Any:
        """Return the value as it is; accounts nothing."""
        return self._config.get(field)

    def is_on(self, field: str) -> bool:
        """Whether the field has a value other than "nobody switched it on"; accounts nothing."""
        return not is_off(self._config.get(field))

    def show(self, field: str) -> str:
        """Return the value for a message."""
        return repr(self._config.get(field))[:80]

    def refuse(self, field: str, reason: str) -> None:
        """Refuse the adapter because of the field's value; `reason` says the way out."""
        self._ledger.refuse_field(field, f"{field[:80]}={self.show(field)}: {reason}")

    def without_effect(self, reasons: Mapping[str, str]) -> None:
        """Note fields that cannot change an output, each with the reason."""
        for field, reason in reasons.items():
            if field in self._config:
                self._ledger.field(field, "no effect", reason)

    def must_be_off(self, ways_out: Mapping[str, str]) -> None:
        """Refuse each of these fields that is on, with what it is and the nearest way out."""
        for field, way_out in ways_out.items():
            if self.is_on(field):
                self.refuse(field, way_out)

    def flag(self, field: str, default: bool = False) -> bool:
        """Return a boolean; null is the default."""
        value = self.raw(field)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self._ledger.refuse_field(field, f"{field} must be true or false, not {self.show(field)}")
        return default

    def positive_int(self, field: str, default: int) -> int:
        """Return a whole number of at least 1; null is a fault."""
        return self._checked_int(field, field, self.raw(field, default)) or default

    def optional_int(self, field: str) -> int | None:
        """Return a whole number of at least 1, or None for null."""
        value = self.raw(field)
        return None if value is None else self._checked_int(field, field, value)

    def number(self, field: str, default: float) -> float:
        """Return a finite number; null is a fault."""
        found = self._checked_number(field, field, self.raw(field, default))
        return default if found is None else found

    def choice(self, field: str, allowed: Sequence[_Choice], default: _Choice) -> _Choice:
        """Return one of the allowed strings."""
        value = self.raw(field, default)
        for option in allowed:
            if value == option:
                return option
        self._ledger.refuse_field(
            field, f"{field}={self.show(field)}: known are {', '.join(map(repr, allowed))}"
        )
        return default

    def text(self, field: str) -> str | None:
        """Return a string; null and the empty string are None."""
        value = self.raw(field)
        if value is None or isinstance(value, str):
            return value or None
        self._ledger.refuse_field(field, f"{field} must be a string")
        return None

    def int_list(self, field: str, *, below: int) -> tuple[int, ...] | None:
        """Return a list of numbers of at least 0 and less than `below`; null is None."""
        value = self.raw(field)
        if value is None:
            return None
        if isinstance(value, list) and all(_is_int(item) and 0 <= item < below for item in value):
            return tuple(value)
        self._ledger.refuse_field(
            field, f"{field} must be a list of whole numbers from 0 to {below - 1}"
        )
        return None

    def names(self, field: str) -> tuple[str, ...]:
        """Return a list of strings; null and one string are lists too."""
        value = self.raw(field)
        items = [] if is_off(value) else [value] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items)
        self._ledger.refuse_field(field, f"{field} must be a list of names")
        return ()

    def rank_rule(
        self,
        *,
        rank: str = "r",
        alpha: str = "lora_alpha",
        rank_default: int = 8,
        alpha_default: float = 8,
    ) -> RankRule:
        """Read rank, alpha, `use_rslora` and the two patterns; names and defaults are PEFT's."""
        return RankRule(
            rank=self.positive_int(rank, rank_default),
            alpha=self.number(alpha, alpha_default),
            use_rslora=self.flag("use_rslora"),
            rank_patterns=self._rank_patterns("rank_pattern"),
            alpha_patterns=self._alpha_patterns("alpha_pattern"),
        )

    def target_rule(self) -> TargetRule:
        """Read `target_modules` and the fields that narrow it."""
        return TargetRule(
            targets=self.module_choice("target_modules"),
            excluded=self.module_choice("exclude_modules"),
            layers=self._layers(),
            layers_patterns=self._layers_patterns(),
        )

    def module_choice(self, field: str) -> ModuleChoice | None:
        """Return modules by tails or by a pattern; None for a field that is off or all linears."""
        value = self.raw(field)
        if is_off(value) or (field == "target_modules" and value == "all-linear"):
            return None
        if isinstance(value, str):
            pattern = self.pattern(field, value)
            return ModuleChoice(pattern=pattern) if pattern else None
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return ModuleChoice(tails=frozenset(value))
        self._ledger.refuse_field(field, f"{field} must be a pattern or a list of module names")
        return None

    def pattern(self, field: str, pattern: str) -> ModulePattern | None:
        """Compile a pattern of a field; all of them share one budget of steps."""
        try:
            return ModulePattern(pattern, self._budget)
        except PatternError as error:
            self._ledger.refuse_field(field, f"{field}: the pattern {pattern[:80]!r} {error}")
            return None

    def read_common(self) -> str | None:
        """Account for the fields of every configuration; return the base it names."""
        self.without_effect(_COMMON)
        self.raw("peft_type")
        if self.raw("task_type") not in (None, "CAUSAL_LM"):
            self._ledger.refuse_field(
                "task_type",
                f"task_type={self.show('task_type')}: only 'CAUSAL_LM' adapters can be served",
            )
        base_model = self.text("base_model_name_or_path")
        return base_model[:500] if base_model else None

    def finish(self) -> None:
        """Refuse by name what nobody has read, unless it is off."""
        for field, value in self._config.items():
            if self._ledger.has_verdict("field", field):
                continue
            if is_off(value):
                self._ledger.field(field, "no effect", _OFF)
            else:
                self.refuse(field, "unknown field; nothing is known that would serve it exactly")

    def _checked_int(self, field: str, label: str, value: object) -> int | None:
        if _is_int(value) and isinstance(value, int) and 1 <= value < 1 << 31:
            return value
        self._ledger.refuse_field(
            field, f"{label} must be a whole number of at least 1, not {repr(value)[:80]}"
        )
        return None

    def _checked_number(self, field: str, label: str, value: object) -> float | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and isinstance(value, int | float) and abs(value) < _MAX_NUMBER:
            return float(value)
        self._ledger.refuse_field(field, f"{label} must be a finite number, not {repr(value)[:80]}")
        return None

    def _rank_patterns(self, field: str) -> tuple[tuple[ModulePattern, int], ...]:
        found = []
        for key, value in self._pattern_items(field):
            rank = self._checked_int(field, f"{field}[{key[:80]!r}]", value)
            if (pattern := self.pattern(field, key)) and rank is not None:
                found.append((pattern, rank))
        return tuple(found)

    def _alpha_patterns(self, field: str) -> tuple[tuple[ModulePattern, float], ...]:
        found = []
        for key, value in self._pattern_items(field):
            alpha = self._checked_number(field, f"{field}[{key[:80]!r}]", value)
            if (pattern := self.pattern(field, key)) and alpha is not None:
                found.append((pattern, alpha))
        return tuple(found)

    def _pattern_items(self, field: str) -> list[tuple[str, object]]:
        value = self.raw(field)
        if is_off(value):
            return []
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            self._ledger.refuse_field(
                field, f"{field} must be an object of at most {_MAX_PATTERNS} patterns"
            )
            return []
        return list(value.items())

    def _layers(self) -> frozenset[int] | None:
        value = self.raw("layers_to_transform")
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(_is_int(layer) for layer in layers):
            self._ledger.refuse_field(
                "layers_to_transform", "layers_to_transform must be layer numbers"
            )
            return None
        return frozenset(layers)

    def _layers_patterns(self) -> tuple[ModulePattern, ...]:
        value = self.raw("layers_pattern")
        if is_off(value):
            return ()
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            self._ledger.refuse_field(
                "layers_pattern", "layers_pattern must be a pattern or a list of patterns"
            )
            return ()
        compiled = (self.pattern("layers_pattern", pattern) for pattern in patterns)
        return tuple(pattern for pattern in compiled if pattern)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
