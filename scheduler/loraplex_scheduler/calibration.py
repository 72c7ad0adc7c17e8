"""Fitting times to what they depend on, one observation at a time.

Least squares of *relative* errors with exponential forgetting, under the constraint that no
coefficient is negative, as no work takes less than no time. The normal equations are kept and
solved by coordinate descent from the last solution (Franc, Hlavac and Navara, "Sequential
coordinate-wise algorithm for the non-negative least squares problem", 2005): a few sweeps per
observation, which go on where the last ones stopped. Clipping the estimates of recursive least
squares instead gets stuck: what one coefficient lost by clipping, the others no longer make up for
once the gains are small.

Relative errors are what promises need, and they make the fit robust: a step that took ten times as
long, because the machine was busy with something else, weighs a hundredth. One that seems to have
taken next to no time would outweigh all others: a host that was held up sees two steps end at once.
So errors are relative to the prediction, or a good part of it, where that is more than the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Final

#: What the prior counts, in observations.
_PRIOR_WEIGHT: Final = 0.01

#: Errors are relative to no less than this part of the prediction.
_MIN_PART: Final = 0.5

#: Sweeps over all coefficients per observation.
_NUM_SWEEPS: Final = 4


class LinearFit:
    """Predicts the sum of coefficient times feature.

    Attributes:
        coefficients: one per feature; 0 or more.
    """

    def __init__(self, prior: Sequence[float], *, forgetting: float) -> None:
        """
        Args:
            prior: the coefficients before the first observation; positive. Later only their
                ratios count.
            forgetting: what all earlier observations count with each new one; below 1.
        """
        self.coefficients = list(prior)
        self._prior = tuple(prior)
        self._forgetting = forgetting
        # Of the unknowns u = coefficient / prior, so that units do not matter.
        self._unknowns = [1.0] * len(prior)
        self._matrix: list[list[float]] = []
        self._right: list[float] = []

    def predict(self, features: Sequence[float]) -> float:
        """Return the prediction; 0 or more."""
        return _dot(self.coefficients, features)

    def observe(self, features: Sequence[float], value: float) -> None:
        """Learn that these features came with this value, which is positive."""
        if not self._matrix:
            self._begin(value / self.predict(features))
        unit = max(value, _MIN_PART * self.predict(features))
        x = [f * p / unit for f, p in zip(features, self._prior, strict=True)]
        keep = self._forgetting
        for i, xi in enumerate(x):
            self._matrix[i] = [keep * a + xi * xj for a, xj in zip(self._matrix[i], x, strict=True)]
            self._right[i] = keep * self._right[i] + xi * value / unit
        for _ in range(_NUM_SWEEPS):
            self._sweep()
        self.coefficients = [u * p for u, p in zip(self._unknowns, self._prior, strict=True)]

    def _begin(self, scale: float) -> None:
        """Take the first observation for the order of magnitude of everything."""
        num = len(self._prior)
        self._unknowns = [scale] * num
        weight = _PRIOR_WEIGHT / scale**2
        self._matrix = [[weight * (i == j) for j in range(num)] for i in range(num)]
        self._right = [weight * scale] * num

    def _sweep(self) -> None:
        """Set each unknown to its best value of at least 0, the others staying as they are."""
        unknowns = self._unknowns
        for i, row in enumerate(self._matrix):
            if row[i] > 0.0:
                step = (self._right[i] - _dot(row, unknowns)) / row[i]
                unknowns[i] = max(0.0, unknowns[i] + step)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    total: float = sum(map(mul, a, b))
    return total
