from __future__ import annotations

import json

import pytest

from loraplex_server.simulator.report import Check, Report, Table

TABLE = Table("Loads", ("engine", "req/s"), [["ours", 12.345], ["theirs", float("nan")]])


def test_a_table_puts_numbers_to_the_right():
    assert TABLE.text().splitlines() == [
        "Loads",
        "engine  req/s",
        "------  -----",
        "ours     12.3",
        "theirs      -",
    ]


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (Check("x", 1.0, 1.0), True),
        (Check("x", 0.9, 1.0), False),
        (Check("x", 0.9, 1.0, is_at_most=True), True),
        (Check("x", 1.1, 1.0, is_at_most=True), False),
        (Check("x", float("nan"), 1.0), False),
    ],
)
def test_a_check_says_whether_it_holds(check, holds):
    assert check.holds == holds
    assert check.text().startswith("met " if holds else "NOT MET ")


def test_a_report_is_one_line_of_json():
    report = Report("x", {"seed": 1, "ranks": (8, 16)}, [TABLE], [Check("y", 2.0, 1.0)])
    line = report.json_line()
    assert "\n" not in line
    assert json.loads(line)["checks"] == [{"what": "y", "value": 2.0, "target": 1.0, "holds": True}]
    assert json.loads(line)["tables"][0]["rows"][1] == ["theirs", None]
