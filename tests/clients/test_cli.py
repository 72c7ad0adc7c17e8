from __future__ import annotations

import json
import os
import socket
import sys

import pytest
from typer.testing import CliRunner

from loraplex import LoraplexError, errors
from loraplex.cli.app import app
from loraplex.cli.problems import explain
from loraplex.errors import ErrorDetail
from tests.clients.tiny_loraplex import TinyLoraplex
from tests.support.http_server import Reply, serve


@pytest.fixture
def tiny():
    return TinyLoraplex()


@pytest.fixture
def server(tiny):
    with serve(tiny.answer) as running:
        yield running


@pytest.fixture
def loraplex(server):
    """Run the command line against the tiny server."""

    def run(*args: str, stdin: str = "", env: dict | None = None):
        return CliRunner().invoke(app, ["--base-url", server.url, *args], input=stdin, env=env)

    return run


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "sql-writer"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    return folder


def test_an_adapter_is_pushed_under_its_folders_name(loraplex, tiny, folder):
    result = loraplex("adapters", "push", str(folder))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "pushed sql-writer: rank 8, 1.0 kB, on q_proj, v_proj\n"
    assert result.stderr == "try it: loraplex chat --model sql-writer\n"
    assert tiny.adapters["sql-writer"]["files"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_is_pushed_under_a_given_name(loraplex, tiny, folder):
    assert loraplex("adapters", "push", str(folder), "--name", "team/sql").exit_code == 0
    assert list(tiny.adapters) == ["team/sql"]


def test_a_refused_adapter_is_shown_with_every_reason(loraplex, tiny, folder):
    error = {"message": "adapter refused", "reasons": ["use_dora is on", "rank 512 > 256"]}
    tiny.failing["POST", "/v1/adapters"] = Reply({"error": error}, 422)
    result = loraplex("adapters", "push", str(folder))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: adapter refused; nothing was kept; correct it and push it again\n"
        "  - use_dora is on\n"
        "  - rank 512 > 256\n"
    )


def test_one_reason_stays_in_the_line():
    for message in ("refused", "refused: it holds NaN"):
        detail = ErrorDetail(message, reasons=("it holds NaN",))
        line = explain(errors.UnprocessableEntityError(422, detail))
        assert line.startswith("refused: it holds NaN; nothing was kept")


def test_the_base_check_can_be_skipped(loraplex, server, folder):
    assert loraplex("adapters", "push", str(folder), "--skip-base-check").exit_code == 0
    assert b'name="check_base"\r\n\r\nfalse\r\n' in server.requests[0].body


def test_pushing_what_is_no_adapter_says_what_is_missing(loraplex, tmp_path):
    result = loraplex("adapters", "push", str(tmp_path))
    assert result.exit_code == 1
    assert "has no adapter_config.json and no adapter_model.safetensors" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_adapters_are_listed_as_lines_for_programs(loraplex, tiny):
    tiny.add("a", state="resident")
    tiny.add("b" * 90)
    lines = loraplex("adapters", "list").stdout.splitlines()
    assert lines[0].split("\t") == ["name", "state", "rank", "size", "pages", "created"]
    assert lines[1].split("\t")[:5] == ["a", "resident", "8", "1.5 MB", "3"]
    assert lines[2].startswith("b" * 90 + "\t")


def test_adapters_and_models_are_written_as_json(loraplex, tiny):
    tiny.add("a", unknown_field=1)
    assert json.loads(loraplex("adapters", "list", "--json").stdout)[0]["unknown_field"] == 1
    assert json.loads(loraplex("adapters", "show", "a", "--json").stdout)["name"] == "a"
    assert json.loads(loraplex("models", "--json").stdout)[1]["parent"] == "base"


def test_one_adapter_is_shown(loraplex, tiny):
    tiny.add("team/sql")
    shown = loraplex("adapters", "show", "team/sql").stdout
    assert "modules       q_proj, v_proj\n" in shown
    assert "id            sha256:00\n" in shown
    assert "owner         nobody\n" in shown


def test_an_unknown_adapter_is_an_error_with_its_request_id(loraplex):
    result = loraplex("adapters", "show", "nothing")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: no such thing; `loraplex models` lists what the server knows (request req-9)\n"
    )


def test_removing_asks_first(loraplex, tiny):
    tiny.add("a")
    assert loraplex("adapters", "rm", "a", stdin="n\n").exit_code == 1
    assert loraplex("adapters", "rm", "a").exit_code == 1  # nobody there to answer
    assert list(tiny.adapters) == ["a"]
    assert loraplex("adapters", "rm", "a", stdin="y\n").stdout.endswith("removed a\n")
    tiny.add("b")
    assert loraplex("adapters", "rm", "b", "--yes").exit_code == 0
    assert not tiny.adapters


def test_models_are_listed(loraplex, tiny):
    tiny.add("sql")
    assert loraplex("models").stdout == "name\tbase\nbase\t-\nsql\tbase\n"


def test_a_prefetch_is_asked_for(loraplex, tiny):
    tiny.add("team/sql")
    result = loraplex("adapters", "prefetch", "team/sql")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "asked for team/sql: it is on disk, and will be brought nearer\n"
    assert (
        json.loads(loraplex("adapters", "prefetch", "team/sql", "--json").stdout)["tier"] == "disk"
    )
    missing = loraplex("adapters", "prefetch", "nothing")
    assert (missing.exit_code, missing.stdout) == (1, "")


def test_the_pool_is_shown_as_a_map(loraplex, tiny):
    shown = loraplex("pool").stdout
    uses, holders = shown.split("\n\n")
    assert uses.splitlines() == [
        "use\tpages\tsize\tshare\tmap",
        "running sequences\t10\t41.0 kB\t10.0%\t####",
        "prefixes in use\t5\t20.5 kB\t5.0%\t##",
        "prefixes, idle\t20\t81.9 kB\t20.0%\t########",
        "adapters\t15\t61.4 kB\t15.0%\t######",
        "free\t50\t204.8 kB\t50.0%\t####################",
    ]
    assert holders.splitlines() == [
        "adapter\tstate\tweights\tprefixes",
        "base\tresident\t0\t20",
        "sql\tresident\t9\t5",
        "sha256:11\tloading\t-\t0",
        "host memory: 1 adapters, 4.1 kB of 8.2 kB",
    ]
    assert "... and 2 more (--top 0 shows all)\n" in loraplex("pool", "--top", "1").stdout
    assert json.loads(loraplex("pool", "--json").stdout) == tiny.pool
    tiny.pool["host"]["capacity_bytes"] = 0
    assert loraplex("pool").stdout.endswith("\nhost memory keeps no adapters\n")


def test_control_characters_in_names_do_not_reach_the_terminal(loraplex, tiny):
    tiny.add("a\x1b[2Jb")
    assert "\x1b" not in loraplex("models").stdout


def test_a_server_that_is_not_there_is_one_line_saying_how_to_start_it():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = CliRunner().invoke(app, ["--base-url", url, "models"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot reach a server at {url} (")
    assert "`loraplex serve`" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_server_and_the_key_come_from_the_environment(server):
    env = {"LORAPLEX_BASE_URL": server.url, "LORAPLEX_API_KEY": "secret"}
    assert CliRunner().invoke(app, ["models"], env=env).exit_code == 0
    assert server.requests[0].headers["authorization"] == "Bearer secret"


def test_a_bad_base_url_is_one_line():
    result = CliRunner().invoke(app, ["--base-url", "localhost", "models"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_the_version_is_shown():
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("loraplex ")


@pytest.mark.parametrize("args", [["--help"], ["--port", "80", "-x", "--", "y"], []])
def test_serve_becomes_the_server_with_every_argument(args, monkeypatch):
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: seen.append((path, argv)))
    assert CliRunner().invoke(app, ["serve", *args]).exit_code == 0
    assert seen == [(sys.executable, [sys.executable, "-m", "loraplex_server", *args])]


def test_checking_an_adapter_becomes_the_servers_own_check(monkeypatch):
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: seen.append((path, argv)))
    args = ["a/folder", "--model", "m", "--json", "--help"]
    assert CliRunner().invoke(app, ["adapters", "check", *args]).exit_code == 0
    module = "loraplex_server.check_adapter"
    assert seen == [(sys.executable, [sys.executable, "-m", module, *args])]


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (409, "adapter_name_taken", "--replace makes it a new version"),
        (409, "version_conflict", "adapters versions"),
        (409, "version_is_current", ""),
        (409, "pin_refused", ""),
        (403, "source_forbidden", ""),
        (502, "source_failed", ""),
        (504, "adapter_draining", ""),
        (404, "not_found", ""),  # of a proxy, as it has no request's id
    ],
)
def test_advice_is_of_the_error_and_not_of_its_status_alone(status, code, advice):
    line = explain(errors.error_type(status)(status, ErrorDetail("it failed", code=code)))
    assert advice in line
    assert advice or line == "it failed"


def test_status_errors_have_advice_in_one_line():
    detail = ErrorDetail("it\nfailed", code="x")
    for status in (400, 401, 403, 404, 409, 413, 418, 422, 429, 500):
        line = explain(errors.error_type(status)(status, detail))
        assert line.startswith("it failed")
        assert "\n" not in line
        assert (";" in line) == (status not in (400, 409, 418))
    waiting = errors.InternalServerError(503, detail, retry_after_s=5.0)
    assert explain(waiting) == "it failed; try again in 5 s"
    assert explain(errors.RateLimitError(429, detail, retry_after_s=2.4)).endswith("in 3 s")
    assert "busy" in explain(errors.APITimeoutError("http://h:1/v1/models", "timed out"))
    assert explain(LoraplexError("other.")) == "other"


def test_a_pinned_adapter_is_not_said_to_expire(loraplex, tiny):
    tiny.add("sql", ttl_s=60, pinned=True)
    tiny.add("pirate", ttl_s=60)
    tiny.add("json")
    shown = {name: loraplex("adapters", "show", name).stdout for name in tiny.adapters}
    assert "never while pinned, else 60 s after its last use\n" in shown["sql"]
    assert "expires       60 s after its last use\n" in shown["pirate"]
    assert "expires       never\n" in shown["json"]


def test_a_connection_that_breaks_is_not_told_as_a_server_that_is_not_there():
    broken = errors.APIConnectionError("http://h:1/v1/models", "reset", was_connected=True)
    assert explain(broken) == (
        "the connection to http://h:1 broke (reset); look at the server's log"
    )


def test_versions_are_listed_and_rolled_back(loraplex, tiny, server):
    tiny.add("sql", version=2)
    lines = loraplex("adapters", "versions", "sql").stdout.splitlines()
    assert lines[0].split("\t") == ["version", "current", "id", "size", "created", "source"]
    assert lines[1].split("\t")[:3] == ["2", "yes", "sha256:00"]
    back = loraplex("adapters", "rollback", "sql", "1")
    assert back.stdout == "sql stands for version 2, sha256:00\n"
    assert server.requests[-1].json() == {"version": 1}
    loraplex("adapters", "rollback", "sql", "sha256:" + "0" * 64)
    assert server.requests[-1].json() == {"id": "sha256:" + "0" * 64}


def test_settings_are_changed(loraplex, tiny, server, tmp_path):
    tiny.add("sql")
    assert loraplex("adapters", "pin", "sql").stdout == "pinned sql: 3 pages\n"
    assert server.requests[-1].json() == {"pinned": True}
    assert loraplex("adapters", "unpin", "sql").exit_code == 0
    assert server.requests[-1].json() == {"pinned": False}
    file = tmp_path / "defaults.json"
    file.write_text('{"system_prompt": "Ahoy"}')
    result = loraplex("adapters", "set", "sql", "--ttl", "never", "--defaults", str(file))
    assert result.stdout == "changed sql\n"
    assert server.requests[-1].json() == {"ttl_s": None, "defaults": {"system_prompt": "Ahoy"}}
    loraplex("adapters", "set", "sql", "--ttl", "60")
    assert server.requests[-1].json() == {"ttl_s": 60}
    for text, readers in (("a,b", ["a", "b"]), ("*", ["*"]), ("-", [])):
        loraplex("adapters", "set", "sql", "--readers", text)
        assert server.requests[-1].json() == {"readers": readers}
    for options in ((), ("--ttl", "soon"), ("--defaults", str(tmp_path / "no"))):
        assert loraplex("adapters", "set", "sql", *options).exit_code == 1


def test_a_url_is_fetched_by_the_server(loraplex, tiny, server):
    result = loraplex(
        "adapters", "push", "s3://b/sql.zip", "--name", "sql", "--sha256", "0" * 64, "--replace"
    )
    assert result.exit_code == 0, result.stderr
    assert server.requests[-1].json() == {
        "name": "sql",
        "source": "s3://b/sql.zip",
        "sha256": "0" * 64,
        "check_base": True,
        "replace": True,
    }
    assert "--name NAME" in loraplex("adapters", "push", "s3://b/sql.zip").stderr


def test_a_version_is_pushed_over_the_expected_one(loraplex, server, folder):
    result = loraplex("adapters", "upload", str(folder), "--replace", "--expected-id", "sha256:00")
    assert result.exit_code == 0, result.stderr
    assert b'name="replace"\r\n\r\ntrue\r\n' in server.requests[0].body
    assert b'name="expected_id"\r\n\r\nsha256:00\r\n' in server.requests[0].body


def test_an_adapter_is_judged_without_being_kept(loraplex, tiny, folder):
    entry = {"subject": "r", "verdict": "applied", "detail": ""}
    good = {"valid": True, "reasons": [], "report": [entry]}
    tiny.failing["POST", "/v1/adapters/validate"] = Reply(good)
    result = loraplex("adapters", "validate", str(folder))
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "it would be registered")
    assert "applied\tr\t" in result.stdout
    bad = {"valid": False, "reasons": ["rank 512 > 256"], "report": []}
    tiny.failing["POST", "/v1/adapters/validate"] = Reply(bad)
    result = loraplex("adapters", "validate", str(folder))
    assert (result.exit_code, result.stdout.splitlines()[1]) == (1, "  - rank 512 > 256")


def test_a_removal_can_cancel_and_says_what_it_freed(loraplex, tiny, server):
    tiny.add("sql")
    result = loraplex("adapters", "rm", "sql", "--yes", "--cancel", "--timeout", "5")
    assert result.stdout == "removed sql\n"
    assert "freed 4.1 kB of the pool" in result.stderr
    assert server.requests[-1].path.endswith("/sql")
