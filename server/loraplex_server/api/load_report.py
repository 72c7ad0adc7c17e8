"""ORCA: an answer tells how loaded its server is, to whoever asks for it in the request.

Open Request Cost Aggregation, as gRPC and Envoy define it and vLLM answers it: a request with
`endpoint-load-metrics-format: JSON` or `TEXT` gets the header `endpoint-load-metrics`, so a load
balancer knows the load without scraping. Other formats are nothing that a header can carry as text;
requests that ask for them get no report.
"""

from __future__ import annotations

import json
from typing import Final

from starlette.datastructures import Headers

from loraplex_server.api.engine_metrics import kv_usage
from loraplex_server.engine.handle import EngineHandle

ASKING_HEADER: Final = "endpoint-load-metrics-format"
REPORT_HEADER: Final = b"endpoint-load-metrics"


class LoadReport:
    """Reads the engine's latest snapshot; keeps nothing."""

    def __init__(self, engine: EngineHandle) -> None:
        self._engine = engine

    def headers(self, asked: Headers) -> list[tuple[bytes, bytes]]:
        """Return the header to answer with, if the request asks for one."""
        wanted = asked.get(ASKING_HEADER, "").strip().upper()
        if wanted == "JSON":
            report = json.dumps({"named_metrics": self._named()}, separators=(",", ":"))
        elif wanted == "TEXT":
            report = ",".join(f"named_metrics.{name}={v}" for name, v in self._named().items())
        else:
            return []
        return [(REPORT_HEADER, f"{wanted} {report}".encode())]

    def _named(self) -> dict[str, float]:
        stats = self._engine.stats
        return {
            "kv_cache_usage_perc": round(kv_usage(stats), 6),
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
        }
