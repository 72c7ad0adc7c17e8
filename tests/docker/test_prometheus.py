from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.support.prometheus import CONFIG, needs

DOCUMENT = CONFIG.parents[1] / "docs" / "metrics.md"


def alerts() -> list[dict]:
    content = yaml.safe_load((CONFIG / "alerts.rules.yml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


@needs("promtool")
@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "recording.rules.yml", "alerts.rules.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_the_configuration_and_the_rules_do_what_their_tests_say(command):
    done = subprocess.run(
        ["promtool", *command], cwd=CONFIG, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout


def test_every_alert_says_what_happens_and_what_to_do():
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    }
    for alert in alerts():
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        assert alert["labels"]["severity"] in ("page", "ticket")
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert page == "docs/metrics.md"
        assert anchor in anchors, alert["alert"]
        assert f"`{alert['alert']}`" in DOCUMENT.read_text(encoding="utf-8")


def test_most_alerts_are_tested():
    tested = re.findall(r"alertname: (\w+)", (CONFIG / "alerts.test.yml").read_text())
    assert len(set(tested)) >= 7
