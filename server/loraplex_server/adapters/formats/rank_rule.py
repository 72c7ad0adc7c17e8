"""Rank and scale of a module, as PEFT derives them from a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraplex_server.adapters.peft_pattern import ModulePattern


@dataclass(frozen=True)
class RankRule:
    """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA; patterns first, in file order."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_patterns: tuple[tuple[ModulePattern, int], ...] = ()
    alpha_patterns: tuple[tuple[ModulePattern, float], ...] = ()

    def rank_of(self, module: str) -> int:
        """Return the rank PEFT gives `module`; raises PatternError."""
        return next((r for p, r in self.rank_patterns if p.matches_tail(module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha PEFT gives `module`; raises PatternError."""
        return next((a for p, a in self.alpha_patterns if p.matches_tail(module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """Return what PEFT multiplies `B A` by in `module`; raises PatternError."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
