"""`loraplex top`: the numbers, the view at every width, and a server that goes away."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loraplex import Client
from loraplex.cli.app import app
from loraplex.cli.top.command import Watch
from loraplex.cli.top.reading import History, Reading, Window, adapters_by_tier, summary
from loraplex.cli.top.view import Notice, render
from loraplex.types import Metrics, Pool
from tests.clients.tiny_loraplex import TinyLoraplex
from tests.support.http_server import Reply, serve

TEXT = """\
# TYPE loraplex_requests_running gauge
loraplex_requests_running 3
# TYPE loraplex_requests_finished_total counter
loraplex_requests_finished_total{{outcome="stop"}} {finished}
loraplex_requests_finished_total{{outcome="length"}} {finished}
# TYPE loraplex_adapter_requests_total counter
loraplex_adapter_requests_total{{adapter="sql"}} {finished}
# TYPE loraplex_time_to_first_token_seconds histogram
loraplex_time_to_first_token_seconds_bucket{{le="0.1"}} {finished}
loraplex_time_to_first_token_seconds_bucket{{le="0.2"}} {both}
loraplex_time_to_first_token_seconds_bucket{{le="+Inf"}} {both}
loraplex_time_to_first_token_seconds_sum 5
loraplex_time_to_first_token_seconds_count {both}
"""


def reading(at_s: float, finished: int) -> Reading:
    text = TEXT.format(finished=finished, both=2 * finished)
    pool = Pool.model_validate(TinyLoraplex().pool)
    return Reading(at_s, Metrics.from_body(text.encode()), pool)


def test_rates_are_of_the_time_between_readings():
    told = summary(Window(reading(10.0, 100), reading(20.0, 150)))
    assert told["requests_per_s"] == 10.0  # both outcomes
    assert told["requests_running"] == 3
    assert told["ttft_s"] == {"p50": 0.1, "p90": 0.18, "p99": pytest.approx(0.198), "count": 100}
    assert told["between_tokens_s"]["p50"] is None


def test_counters_that_began_again_count_from_zero():
    assert summary(Window(reading(10.0, 100), reading(20.0, 10)))["requests_per_s"] == 2.0


def test_without_time_between_readings_there_is_no_rate():
    now = reading(10.0, 100)
    assert summary(Window(now, now))["requests_per_s"] is None


def test_a_history_forgets_what_is_older_than_its_span():
    history = History(span_s=5.0)
    windows = [history.add(reading(float(at), at)) for at in range(10)]
    assert [window.seconds for window in windows] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_an_adapters_rates_are_read_by_the_names_of_the_server():
    drawn = StringIO()
    window = Window(reading(10.0, 100), reading(20.0, 150))
    view = render(window, Notice("http://127.0.0.1:8000"), columns=90, lines=None)
    Console(file=drawn, width=90).print(view)
    (row,) = [line.split() for line in drawn.getvalue().splitlines() if line.startswith("sql ")]
    assert row[-2:] == ["5", "0"]


def test_an_adapter_counts_where_it_is_nearest():
    pool = Pool.model_validate(
        {
            **TinyLoraplex().pool,
            "host": {"adapters": [{"id": f"sha256:{n}", "name": n} for n in ("00", "11", "22")]},
        }
    )
    assert adapters_by_tier(pool) == {"pool": 1, "loading": 1, "host_only": 1}


@pytest.mark.parametrize("columns", [20, 40, 57, 80, 160])
def test_no_line_is_wider_than_the_terminal(columns):
    window = Window(reading(10.0, 100), reading(20.0, 150))
    notice = Notice("http://127.0.0.1:8000", "ok", "x" * 300)
    view = render(window, notice, columns=columns, lines=None)
    console = Console(width=200, record=True, file=StringIO())
    console.print(view)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= max(columns, 40)
    assert len(next(line for line in lines if set(line) <= set("#=-A."))) == max(columns, 40)
    assert any("sql" in line for line in lines)


def test_a_low_terminal_gets_the_numbers_first():
    window = Window(reading(10.0, 100), reading(20.0, 150))
    console = Console(width=80, record=True, file=StringIO())
    console.print(render(window, Notice("http://x"), columns=80, lines=8))
    assert len(console.export_text().splitlines()) == 8
    console.print(render(window, Notice("http://x"), columns=80, lines=18))
    assert "ADAPTER" in console.export_text()


def test_once_against_a_real_server_prints_numbers_for_programs(tiny_server):
    with Client(base_url=tiny_server.base_url) as client:
        client.completions.create(model="tiny", prompt="hello", max_tokens=4, ignore_eos=True)
    command = ["--base-url", tiny_server.base_url, "top", "--once", "--interval", "0.2"]
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    pool = told["pool"]
    uses = ("kv", "prefix_used", "prefix_idle", "adapters", "free")
    assert sum(pool[use] for use in uses) == pool["num_pages"] == 1024
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert "1024 pages" in shown.stdout


def test_a_server_that_goes_away_leaves_the_last_numbers():
    tiny = TinyLoraplex()
    text = TEXT.format(finished=1, both=2).encode()
    tiny.failing["GET", "/metrics"] = Reply(pieces=[text])
    console = Console(width=80, height=40, record=True, file=StringIO())
    with serve(tiny.answer) as running:
        # A kept connection would be served by its thread after the server is gone.
        alone = {"Connection": "close"}
        client = Client(base_url=running.url, max_retries=0, default_headers=alone)
        watch = Watch(client, History(10.0), console)
        tiny.failing["GET", "/v1/pool"] = Reply({"error": {"message": "restarting"}}, 503)
        console.print(watch.next_view())
        assert "restarting" in console.export_text()
        del tiny.failing["GET", "/v1/pool"]
        console.print(watch.next_view())
        assert "100 pages" in console.export_text()
    with client:
        console.print(watch.next_view())
    told = " ".join(console.export_text().split())
    assert "trying again" in told
    assert "the numbers are old" in told
    assert "100 pages" in told  # as it was


def test_the_live_view_needs_a_terminal(tiny_server):
    result = CliRunner().invoke(app, ["--base-url", tiny_server.base_url, "top"])
    assert result.exit_code == 1
    assert "`loraplex top --once` prints a view" in result.stderr
