"""Fitting times to what they depend on, one observation at a time.

Recursive least squares with exponential forgetting (Haykin, "Adaptive Filter Theory", ch. 10), and
three precautions that a live machine needs: an observation far from the prediction is drawn
closer (Huber), as the machine may have been busy with something else; nothing is forgotten in
directions in which nothing new is seen, or the estimate would drift there; no coefficient is
negative, as no work takes less than no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Final

#: Errors of more than so many usual ones are cut off there.
_MAX_ERRORS: Final = 3.0

#: Bounds of the usual error, as a part of the prediction, and how fast it follows the last ones.
_MIN_ERROR, _MAX_ERROR, _ERROR_RATE = 0.02, 1.0, 0.05


class LinearFit:
    """Predicts the sum of coefficient times feature; errors count in proportion to the prediction.

    Attributes:
        coefficients: one per feature; 0 or more.
    """

    def __init__(
        self, prior: Sequence[float], scales: Sequence[float], *, forgetting: float
    ) -> None:
        """
        Args:
            prior: the coefficients before the first observation; positive. Later only their
                ratios count.
            scales: the usual size of each feature, so that its unit does not matter.
            forgetting: what all earlier observations count with each new one; below 1.
        """
        self.coefficients = list(prior)
        self._scales = list(scales)
        self._forgetting = forgetting
        self._covariance: list[list[float]] = []  # of coefficient times scale; from the first on
        self._max_trace = 0.0
        self._usual_error = _MAX_ERROR

    def predict(self, features: Sequence[float]) -> float:
        """Return the prediction; 0 or more."""
        return _dot(self.coefficients, features)

    def observe(self, features: Sequence[float], value: float) -> None:
        """Learn that these features came with this value, which is positive."""
        predicted = self.predict(features)
        if not self._covariance:
            self._begin(value, predicted)
            predicted = value
        # Errors count by the prediction, unless that is off by far.
        unit = min(max(predicted, value / 4), value * 4)
        error = self._cut_off((value - predicted) / unit)
        x = [feature / scale / unit for feature, scale in zip(features, self._scales, strict=True)]
        gain = self._update(x)
        self.coefficients = [
            max(0.0, c + g * error / scale)
            for c, g, scale in zip(self.coefficients, gain, self._scales, strict=True)
        ]

    def _begin(self, value: float, predicted: float) -> None:
        """Take the first observation for the order of magnitude of everything."""
        self.coefficients = [c * value / predicted for c in self.coefficients]
        num = len(self._scales)
        self._covariance = [[value * value * (i == j) for j in range(num)] for i in range(num)]
        self._max_trace = num * value * value

    def _cut_off(self, error: float) -> float:
        limit = _MAX_ERRORS * self._usual_error
        error = min(max(error, -limit), limit)
        usual = self._usual_error + _ERROR_RATE * (abs(error) - self._usual_error)
        self._usual_error = min(max(usual, _MIN_ERROR), _MAX_ERROR)
        return error

    def _update(self, x: Sequence[float]) -> list[float]:
        """Book features into the covariance; return how far an error moves each coefficient."""
        covariance = self._covariance
        px = [_dot(row, x) for row in covariance]
        norm = self._forgetting + _dot(x, px)
        gain = [p / norm for p in px]
        trace = sum(row[i] for i, row in enumerate(covariance))
        keep = 1.0 / self._forgetting if trace < self._max_trace else 1.0
        self._covariance = [
            [keep * (c - g * p) for c, p in zip(row, px, strict=True)]
            for g, row in zip(gain, covariance, strict=True)
        ]
        return gain


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    total: float = sum(map(mul, a, b))
    return total
