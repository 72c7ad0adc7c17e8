"""The metrics of all replicas as one page: each series says whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

#: Added to every series of a replica.
LABEL: Final = "replica"
#: The page's own.
REPLICAS: Final = "loraplex_ray_replicas"


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge_metrics(pages: Mapping[str, bytes], num_lost: int) -> bytes:
    """Return one page in Prometheus' text format of several, and how many there are.

    Args:
        pages: by the replicas' names.
        num_lost: replicas that were asked too and did not answer.
    """
    counts = GaugeMetricFamily(
        REPLICAS, "Replicas, by whether their metrics are on this page.", labels=("scrape",)
    )
    counts.add_metric(("answered",), len(pages))
    counts.add_metric(("lost",), num_lost)
    merged: dict[str, Metric] = {REPLICAS: counts}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            into = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            into.samples += [
                sample._replace(labels={**sample.labels, LABEL: replica})
                for sample in family.samples
            ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(merged.values()))
    return generate_latest(registry)
