"""The committed dashboards as tests look at them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

GRAFANA = Path(__file__).parents[2] / "docker" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


def dashboard(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def queries(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the title of a panel and an expression, for every query."""
    for panel in dashboard(path)["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def with_values(expr: str, rate_interval: str) -> str:
    """Return an expression as Grafana sends it when everything is chosen."""
    expr = expr.replace("$__rate_interval", rate_interval)
    return re.sub(r"\$\w+", ".*", expr)
