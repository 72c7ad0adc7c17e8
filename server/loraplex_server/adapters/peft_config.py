"""`adapter_config.json` of a PEFT LoRA: read, and accounted for field by field.

Invariant: every field is applied, is known to change nothing, or adds a reason to the ledger
(`peft_fields` is the table). The scale of a module is PEFT's: `alpha / r`, or `alpha / sqrt(r)`
with rsLoRA, where `r` and `alpha` may come from `rank_pattern` and `alpha_pattern`, first match
in file order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraplex_server.adapters.errors import InvalidUpload
from loraplex_server.adapters.ledger import Ledger
from loraplex_server.adapters.peft_fields import (
    APPLIED,
    CONVERT_INIT,
    CONVERTIBLE_INITS,
    PLAIN_INITS,
    RETRAIN_INIT,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    is_off,
)
from loraplex_server.adapters.peft_pattern import ModulePattern, PatternError, StepBudget
from loraplex_server.adapters.peft_targets import ModuleChoice, TargetRule

CONFIG_NAME: Final = "adapter_config.json"

#: PEFT's own, for files that leave them out.
_DEFAULT_RANK: Final = 8
_DEFAULT_ALPHA: Final = 8
_MAX_PATTERNS: Final = 20_000
_MAX_ALPHA: Final = 1e30


@dataclass(frozen=True)
class PeftConfig:
    """The part of a LoRA configuration that decides what the adapter computes."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_patterns: tuple[tuple[ModulePattern, int], ...]
    alpha_patterns: tuple[tuple[ModulePattern, float], ...]
    targets: TargetRule
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank PEFT gives `module`; raises PatternError."""
        return next((r for p, r in self.rank_patterns if p.matches_tail(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what PEFT multiplies `B A` by in `module`; raises PatternError."""
        rank = self.rank_of(module)
        alpha = next((a for p, a in self.alpha_patterns if p.matches_tail(module)), self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def load_config_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Parse the file strictly: one object, no duplicate keys, no NaN or Infinity, only Unicode.

    Raises:
        InvalidUpload: it is missing, too large or not such JSON.
        OSError: the disk failed.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise InvalidUpload(f"{CONFIG_NAME} is larger than {max_bytes} bytes")
        config = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        # JSON can write half a surrogate pair; no database, log or answer could.
        json.dumps(config, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise InvalidUpload(f"{CONFIG_NAME} is missing") from error
    except (ValueError, RecursionError) as error:
        raise InvalidUpload(f"{CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidUpload(f"{CONFIG_NAME} must hold one JSON object")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class PeftConfigReader:
    """Turns one parsed configuration into a `PeftConfig`, noting every fault in the ledger."""

    def __init__(self, config: Mapping[str, Any], ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._budget = StepBudget()

    def read(self) -> PeftConfig | None:
        """Return the configuration, or None when it is not a LoRA's at all.

        After faults the result holds defaults in their place, so that the tensors can be checked
        too and one answer lists everything.
        """
        if self._config.get("peft_type") != "LORA":
            self._ledger.add(
                f"peft_type is {self._show('peft_type')}; only 'LORA' is supported so far: "
                "retrain with LoraConfig, or convert the adapter to LoRA"
            )
            return None
        self._check_off_fields()
        self._check_fixed_fields()
        return PeftConfig(
            rank=self._positive_int("r", self._config.get("r", _DEFAULT_RANK)) or _DEFAULT_RANK,
            alpha=self._number("lora_alpha", self._config.get("lora_alpha", _DEFAULT_ALPHA)) or 0.0,
            use_rslora=self._flag("use_rslora"),
            rank_patterns=self._rank_patterns(),
            alpha_patterns=self._alpha_patterns(),
            targets=self._target_rule(),
            base_model=self._base_model(),
        )

    def _show(self, field: str) -> str:
        return repr(self._config.get(field))[:80]

    def _check_off_fields(self) -> None:
        for field, value in self._config.items():
            if field in APPLIED or field in WITHOUT_EFFECT or is_off(value):
                continue
            way_out = UNSUPPORTED.get(field)
            if way_out is None:
                way_out = "unknown field; nothing is known that would serve it exactly"
            self._ledger.add(f"{field[:80]}={repr(value)[:80]}: {way_out}")

    def _check_fixed_fields(self) -> None:
        if self._config.get("task_type") not in (None, "CAUSAL_LM"):
            self._ledger.add(
                f"task_type={self._show('task_type')}: only 'CAUSAL_LM' adapters can be served"
            )
        if self._config.get("bias", "none") != "none":
            self._ledger.add(
                f"bias={self._show('bias')}: trained biases are not supported yet; retrain with "
                "bias='none'"
            )
        if self._flag("fan_in_fan_out"):
            self._ledger.add(
                "fan_in_fan_out=true is for Conv1D models; save the adapter again with false"
            )
        self._check_init(self._config.get("init_lora_weights", True))

    def _check_init(self, init: object) -> None:
        if isinstance(init, bool | str) and init in PLAIN_INITS:
            return
        name = init if isinstance(init, str) else ""
        is_convertible = name.startswith(CONVERTIBLE_INITS)
        way_out = CONVERT_INIT if is_convertible else RETRAIN_INIT
        if not is_convertible and name != "loftq":
            way_out = "unknown initialisation; if it leaves the base as it is, save with true"
        self._ledger.add(f"init_lora_weights={self._show('init_lora_weights')}: {way_out}")

    def _flag(self, field: str) -> bool:
        value = self._config.get(field)
        if value is not None and not isinstance(value, bool):
            self._ledger.add(f"{field} must be true or false, not {self._show(field)}")
            return False
        return bool(value)

    def _positive_int(self, field: str, value: object) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31:
            return value
        self._ledger.add(f"{field} must be a whole number of at least 1, not {repr(value)[:80]}")
        return None

    def _number(self, field: str, value: object) -> float | None:
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) < _MAX_ALPHA
        ):
            return float(value)
        self._ledger.add(f"{field} must be a finite number, not {repr(value)[:80]}")
        return None

    def _rank_patterns(self) -> tuple[tuple[ModulePattern, int], ...]:
        found = []
        for key, value in self._patterns("rank_pattern"):
            rank = self._positive_int(f"rank_pattern[{key[:80]!r}]", value)
            if (pattern := self._pattern("rank_pattern", key)) and rank is not None:
                found.append((pattern, rank))
        return tuple(found)

    def _alpha_patterns(self) -> tuple[tuple[ModulePattern, float], ...]:
        found = []
        for key, value in self._patterns("alpha_pattern"):
            alpha = self._number(f"alpha_pattern[{key[:80]!r}]", value)
            if (pattern := self._pattern("alpha_pattern", key)) and alpha is not None:
                found.append((pattern, alpha))
        return tuple(found)

    def _patterns(self, field: str) -> list[tuple[str, object]]:
        value = self._config.get(field)
        if is_off(value):
            return []
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            self._ledger.add(f"{field} must be an object of at most {_MAX_PATTERNS} patterns")
            return []
        return list(value.items())

    def _pattern(self, field: str, pattern: str) -> ModulePattern | None:
        try:
            return ModulePattern(pattern, self._budget)
        except PatternError as error:
            self._ledger.add(f"{field}: the pattern {pattern[:80]!r} {error}")
            return None

    def _target_rule(self) -> TargetRule:
        return TargetRule(
            targets=self._choice("target_modules"),
            excluded=self._choice("exclude_modules"),
            layers=self._layers(),
            layers_patterns=self._layers_patterns(),
        )

    def _choice(self, field: str) -> ModuleChoice | None:
        value = self._config.get(field)
        if is_off(value) or (field == "target_modules" and value == "all-linear"):
            return None
        if isinstance(value, str):
            pattern = self._pattern(field, value)
            return ModuleChoice(pattern=pattern) if pattern else None
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return ModuleChoice(tails=frozenset(value))
        self._ledger.add(f"{field} must be a pattern or a list of module names")
        return None

    def _layers(self) -> frozenset[int] | None:
        value = self._config.get("layers_to_transform")
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            self._ledger.add("layers_to_transform must be layer numbers")
            return None
        return frozenset(layers)

    def _layers_patterns(self) -> tuple[ModulePattern, ...]:
        value = self._config.get("layers_pattern")
        if is_off(value):
            return ()
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            self._ledger.add("layers_pattern must be a pattern or a list of patterns")
            return ()
        compiled = (self._pattern("layers_pattern", pattern) for pattern in patterns)
        return tuple(pattern for pattern in compiled if pattern)

    def _base_model(self) -> str | None:
        value = self._config.get("base_model_name_or_path")
        if value is None or isinstance(value, str):
            return value[:500] if value else None
        self._ledger.add("base_model_name_or_path must be a string")
        return None
