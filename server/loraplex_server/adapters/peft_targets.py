"""Which modules PEFT would adapt: `target_modules` and the fields that narrow it.

A tensor decides that a module carries LoRA; this decides whether PEFT would load that tensor at
all. One that PEFT would leave out must not be applied here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex_server.adapters.peft_pattern import ModulePattern

#: What `layers_pattern` is matched with: all layers of the supported models live here.
_LAYER_LIST = "model.layers"


@dataclass(frozen=True)
class ModuleChoice:
    """Modules given as a list of name tails, or as one pattern for the whole name."""

    tails: frozenset[str] = frozenset()
    pattern: ModulePattern | None = None

    def matches(self, module: str) -> bool:
        if self.pattern is not None:
            return self.pattern.matches(module)
        return module in self.tails or self._matches_tail(module)

    def _matches_tail(self, module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[at:]) in self.tails for at in range(1, len(parts)))


@dataclass(frozen=True)
class TargetRule:
    """PEFT's `check_target_module_exists`, for modules of one decoder.

    Attributes:
        targets: None is "every linear" (also what a missing `target_modules` leaves us to do).
        layers: None is "all layers".
    """

    targets: ModuleChoice | None = None
    excluded: ModuleChoice | None = None
    layers: frozenset[int] | None = None
    layers_patterns: Sequence[ModulePattern] = ()

    def covers(self, module: str, layer: int | None) -> bool:
        """Whether PEFT would put LoRA on `module` (`model.layers.3.self_attn.q_proj`).

        Args:
            layer: the module's; None for one outside the layers.

        Raises:
            PatternError: a pattern costs too much to match.
        """
        if self.excluded is not None and self.excluded.matches(module):
            return False
        if self.targets is None:
            return True
        if self.targets.pattern is not None or module in self.targets.tails:
            # PEFT narrows by layer only where a list names the tail of a module.
            return self.targets.matches(module)
        return self.targets.matches(module) and self._has_layer(layer)

    def _has_layer(self, layer: int | None) -> bool:
        if self.layers is None:
            return True
        is_layer_list = not self.layers_patterns or any(
            pattern.matches_tail(_LAYER_LIST) for pattern in self.layers_patterns
        )
        return is_layer_list and layer in self.layers
