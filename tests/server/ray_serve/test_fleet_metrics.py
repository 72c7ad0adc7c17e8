from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loraplex.prometheus_text import parse_families
from loraplex_server.ray_serve.fleet_metrics import merge_metrics


def page(value):
    registry = CollectorRegistry()
    Counter("x_requests", "Requests.", ["adapter"], registry=registry).labels("a").inc(value)
    Gauge("x_running", "Running.", registry=registry).set(value)
    Histogram("x_seconds", "Times.", buckets=(1.0,), registry=registry).observe(value)
    return generate_latest(registry)


def test_every_series_of_every_replica_is_there_and_says_whose_it_is():
    pages = {"one": page(1), "two": page(2)}
    families = {family.name: family for family in parse_families(merge_metrics(pages, 3).decode())}
    for replica, text in pages.items():
        for alone in parse_families(text.decode()):
            merged = families[alone.name]
            assert (merged.kind, merged.help) == (alone.kind, alone.help)
            for name, labels, value in alone.samples:
                assert (name, {**labels, "replica": replica}, value) in merged.samples
    assert {kind.kind for kind in families.values()} >= {"counter", "gauge", "histogram"}
    counts = [
        ("loraplex_ray_replicas", {"scrape": "answered"}, 2.0),
        ("loraplex_ray_replicas", {"scrape": "lost"}, 3.0),
    ]
    assert families["loraplex_ray_replicas"].samples == counts
