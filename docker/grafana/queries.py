"""What queries of the dashboards have in common: choices, rates, percentiles."""

from __future__ import annotations

from typing import Final

from dashboard import Query, Variable

INSTANCE: Final = Variable("instance", "instance", "loraplex_engine_ready")
MODEL: Final = Variable("model", "model_name", "vllm:num_requests_running")

OF_INSTANCE: Final = 'instance=~"$instance"'
OF_MODEL: Final = OF_INSTANCE + ', model_name=~"$model"'
_QUANTILES: Final = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


def rate(series: str, labels: str = OF_INSTANCE) -> str:
    """Return the rate of a counter per second."""
    return f"rate({series}{{{labels}}}[$__rate_interval])"


def total(series: str, by: str = "", labels: str = OF_INSTANCE) -> str:
    """Return the rate of a counter, added up."""
    return f"sum by ({by}) ({rate(series, labels)})" if by else f"sum({rate(series, labels)})"


def quantiles(series: str, labels: str = OF_INSTANCE) -> tuple[Query, ...]:
    """Return median, 95th and 99th percentile of a histogram over all instances."""
    buckets = total(f"{series}_bucket", "le", labels)
    return tuple(Query(f"histogram_quantile({q}, {buckets})", name) for q, name in _QUANTILES)


def mean(series: str, by: str, labels: str = OF_INSTANCE) -> str:
    """Return the mean of a histogram."""
    return f"{total(series + '_sum', by, labels)} / {total(series + '_count', by, labels)}"


def one(expr: str, legend: str = "") -> tuple[Query, ...]:
    """Return one query."""
    return (Query(expr, legend),)
