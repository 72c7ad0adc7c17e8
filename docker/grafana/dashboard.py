"""Grafana's JSON, of as much as our dashboards say: panels in rows, queries, units, thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_WIDTH: Final = 24
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_COLORS: Final = ("green", "orange", "red")


@dataclass(frozen=True)
class Query:
    """An expression, and how its lines are called, e.g. `{{instance}}`."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        description: what it tells, and what to do about it.
        unit: as Grafana names them: s, short, percentunit, bytes, reqps.
        limits: from where on it is a warning, and an alarm; none, one or both.
        kind: timeseries, stat, bargauge or table.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    limits: tuple[float, ...] = ()
    kind: str = "timeseries"
    is_stacked: bool = False
    width: int = 8
    height: int = 8


@dataclass(frozen=True)
class Variable:
    """A choice at the top: the values of a label of a series."""

    name: str
    label: str
    series: str


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels, each under a title."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def panels(self) -> Iterator[Panel]:
        for _, panels in self.rows:
            yield from panels

    def to_json(self) -> dict[str, Any]:
        """Return what Grafana reads."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["loraplex"],
            "schemaVersion": 41,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "30s",
            "timezone": "browser",
            "time": {"from": "now-1h", "to": "now"},
            "links": [
                {
                    "type": "dashboards",
                    "title": "loraplex",
                    "tags": ["loraplex"],
                    "asDropdown": True,
                    "keepTime": True,
                    "includeVars": True,
                }
            ],
            "templating": {"list": [_DATASOURCE_CHOICE, *map(_variable, self.variables)]},
            "panels": [*self._panels()],
        }

    def _panels(self) -> Iterator[dict[str, Any]]:
        panel_id = y = 0
        for title, panels in self.rows:
            panel_id += 1
            place = {"h": 1, "w": _WIDTH, "x": 0, "y": y}
            row = {"id": panel_id, "type": "row", "title": title, "collapsed": False}
            yield {**row, "gridPos": place, "panels": []}
            y, x, height = y + 1, 0, 0
            for panel in panels:
                panel_id += 1
                if x + panel.width > _WIDTH:
                    y, x, height = y + height, 0, 0
                place = {"h": panel.height, "w": panel.width, "x": x, "y": y}
                yield {"id": panel_id, "gridPos": place, **_panel(panel)}
                x, height = x + panel.width, max(height, panel.height)
            y += height


_DATASOURCE_CHOICE: Final = {
    "name": "datasource",
    "label": "data source",
    "type": "datasource",
    "query": "prometheus",
    "current": {"text": "Prometheus", "value": "prometheus"},
}


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.series}, {variable.label})"
    return {
        "name": variable.name,
        "label": variable.name,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": variable.name},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "refresh": 2,
        "sort": 1,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    is_instant = panel.kind in ("table", "bargauge")
    steps = [{"color": _COLORS[0], "value": None}]
    steps += [
        {"color": color, "value": limit}
        for color, limit in zip(_COLORS[3 - len(panel.limits) :], panel.limits, strict=False)
    ]
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.is_stacked:
        custom |= {"fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}}
    if panel.limits:
        custom["thresholdsStyle"] = {"mode": "dashed"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": custom if panel.kind == "timeseries" else {},
            },
            "overrides": [],
        },
        "options": _options(panel.kind),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "instant": is_instant,
                "range": not is_instant,
                "format": "table" if panel.kind == "table" else "time_series",
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    if kind == "bargauge":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "orientation": "horizontal",
            "displayMode": "basic",
        }
    return {"showHeader": True}
