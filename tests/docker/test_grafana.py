from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from loraplex_server.api.series import SERIES
from tests.support.grafana import DASHBOARDS, GRAFANA, dashboard, queries
from tests.support.prometheus import CONFIG

EXPOSED = {name for series in SERIES.values() for name in series.exposed_names}
#: What PromQL says itself.
WORDS = {
    *("sum", "max", "min", "by", "on", "and", "or", "rate", "increase", "deriv", "topk"),
    *("histogram_quantile", "min_over_time"),
}


def rules() -> list[dict]:
    files = sorted(CONFIG.glob("*.rules.yml"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def series_in(expr: str) -> set[str]:
    """Return the names that an expression reads, strictly: any word that is no function."""
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", "", re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expr))
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - WORDS


def test_the_committed_dashboards_are_what_the_builder_writes(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); import build, pathlib\n"
    script += "for d in build.DASHBOARDS:\n"
    script += "    pathlib.Path(sys.argv[2], d.uid).write_text(build.written(d))"
    command = [sys.executable, "-c", script, str(GRAFANA), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    built = {path.name.removeprefix("loraplex-"): path.read_text() for path in tmp_path.iterdir()}
    assert built == {path.stem: path.read_text() for path in DASHBOARDS}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_query_declared_series_only(path):
    unknown = {t: series_in(e) - EXPOSED - RECORDED for t, e in queries(path)}
    assert {title: names for title, names in unknown.items() if names} == {}
    assert len(unknown) > 5


def test_rules_read_declared_series_only():
    for rule in rules():
        assert series_in(rule["expr"]) <= EXPOSED | RECORDED | {"up"}, rule["expr"]


def test_labels_in_queries_and_rules_are_declared():
    known = {name: s.labels for s in SERIES.values() for name in s.exposed_names}
    exprs = [rule["expr"] for rule in rules()]
    exprs += [expr for path in DASHBOARDS for _, expr in queries(path)]
    for expr in exprs:
        for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expr):
            labels = set(re.findall(r"(\w+)\s*[=!]", matchers)) - {"instance", "job", "le"}
            assert name in RECORDED | {"up"} or labels <= set(known[name]), expr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_is_and_in_which_unit(path):
    shown = dashboard(path)
    panels = [panel for panel in shown["panels"] if panel["type"] != "row"]
    assert all(
        panel["description"].endswith(".") or ":" in panel["description"] for panel in panels
    )
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
    assert len({panel["id"] for panel in shown["panels"]}) == len(shown["panels"])
    names = {variable["name"] for variable in shown["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)(\w+)", "".join(expr for _, expr in queries(path))))
    assert used <= names
    assert names - used - {"datasource"} == set(), "a choice that changes nothing"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path):
    taken = set()
    for panel in dashboard(path)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_its_datasource_and_dashboards():
    provisioning = GRAFANA / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    [provider] = yaml.safe_load((provisioning / "dashboards/loraplex.yml").read_text())["providers"]
    assert (source["type"], source["uid"]) == ("prometheus", "prometheus")
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    for path in DASHBOARDS:
        [choice] = [v for v in dashboard(path)["templating"]["list"] if v["name"] == "datasource"]
        assert choice["current"]["value"] == source["uid"]
