"""The server's metrics, read from Prometheus text into typed families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from loraplex.prometheus_text import parse_families
from loraplex.types.base import ApiModel


class Sample(ApiModel):
    """One value; `name` is the family's with a suffix such as "_total" or "_bucket"."""

    name: str
    labels: dict[str, str] = {}
    value: float

    def has(self, labels: dict[str, str]) -> bool:
        """Whether it carries all of these labels."""
        return all(self.labels.get(name) == value for name, value in labels.items())


class MetricFamily(ApiModel):
    """All samples of one metric; `kind` is "counter", "gauge", "histogram" or so."""

    name: str
    kind: str = "untyped"
    help: str = ""
    samples: list[Sample] = []


@dataclass(frozen=True)
class Histogram:
    """Observations counted by size.

    Attributes:
        bounds: Upper bounds of the buckets, ascending; the last is infinity.
        counts: Observations up to each bound, as Prometheus counts them.
        total: The sum of all observations.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    total: float = 0.0

    @property
    def count(self) -> float:
        """How many observations there are."""
        return self.counts[-1] if self.counts else 0.0

    def since(self, earlier: Histogram) -> Histogram:
        """Return what was observed after `earlier`; all of it if the server was restarted."""
        if earlier.bounds != self.bounds or earlier.count > self.count:
            return self
        counts = tuple(n - m for n, m in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - earlier.total)

    def quantile(self, q: float) -> float | None:
        """Return the `q`-quantile, linear inside a bucket as `histogram_quantile` has it.

        None without observations; the last finite bound for what lies above it.
        """
        if not self.count:
            return None
        rank, lower, below = q * self.count, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= rank and count > below:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * (rank - below) / (count - below)
            lower, below = bound, count
        return lower


class Metrics(ApiModel):
    """One reading of GET /metrics: families by name."""

    families: dict[str, MetricFamily]

    @classmethod
    def from_body(cls, content: bytes) -> Self:
        """Read Prometheus text."""
        families: dict[str, MetricFamily] = {}
        for family in parse_families(content.decode()):
            samples = [
                Sample(name=name, labels=labels, value=value)
                for name, labels, value in family.samples
            ]
            families[family.name] = MetricFamily(
                name=family.name, kind=family.kind, help=family.help, samples=samples
            )
        return cls(families=families)

    def samples(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of a series by its full name, such as "..._total"."""
        base = name.removesuffix("_total")
        family = self.families.get(name) or self.families.get(base)
        found = family.samples if family else []
        return [sample for sample in found if sample.name == name and sample.has(labels)]

    def value(self, name: str, **labels: str) -> float | None:
        """Return the sum of a series over all other labels, None where there is no sample."""
        found = self.samples(name, **labels)
        return sum(sample.value for sample in found) if found else None

    def histogram(self, name: str, **labels: str) -> Histogram:
        """Return a histogram, added up over all other labels; an empty one if there is none."""
        family = self.families.get(name)
        counts: dict[float, float] = {}
        total = 0.0
        for sample in family.samples if family else ():
            if not sample.has(labels):
                continue
            if sample.name == f"{name}_bucket":
                bound = float(sample.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + sample.value
            elif sample.name == f"{name}_sum":
                total += sample.value
        bounds = tuple(sorted(counts))
        return Histogram(bounds, tuple(counts[bound] for bound in bounds), total)
