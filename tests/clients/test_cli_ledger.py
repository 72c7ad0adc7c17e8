"""`loraplex usage`, `audit` and `completion`."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from loraplex.cli.app import app
from tests.clients.tiny_loraplex import TinyLoraplex
from tests.support.http_server import Reply, serve

RECORD = {
    "object": "usage",
    "start": 1_700_000_000,
    "end": 1_700_003_600,
    "tenant": "acme",
    "adapter": None,
    "requests": 3,
    "prompt_tokens": 10,
    "cached_tokens": 4,
    "completion_tokens": 20,
}
ENTRY = {
    "object": "audit.entry",
    "id": 7,
    "time": 1_700_000_000,
    "actor": "key_1",
    "tenant": "acme",
    "action": "adapter.create",
    "subject": "acme/sql",
    "adapter_id": "sha256:00",
    "request_id": None,
    "details": {"bytes": 5},
}


@pytest.fixture
def ledger():
    """A server with one record of each kind, twice over two pages, and its command line."""
    tiny = TinyLoraplex()

    def answer(received):
        body = {"/v1/usage": RECORD, "/v1/audit": ENTRY}.get(received.path)
        if body is None:
            return tiny.answer(received)
        is_first = "after" not in received.query
        return Reply({"data": [body], "has_more": is_first, "last": "x" if is_first else "y"})

    with serve(answer) as running:

        def run(*args: str):
            return CliRunner().invoke(app, ["--base-url", running.url, *args])

        run.requests = running.requests
        yield run


def test_usage_is_listed_over_its_pages(ledger):
    result = ledger("usage", "--per", "day", "--tenant", "acme", "--since", "2023-11-14")
    head, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert head[2:] == ["tenant", "adapter", "requests", "prompt", "cached", "output"]
    assert [row[2:] for row in rows] == [["acme", "(base)", "3", "10", "4", "20"]] * 2
    first, second = (request.query for request in ledger.requests)
    assert (first["bucket"], first["tenant"], second["after"]) == ("day", "acme", "x")
    assert int(first["start"]) < 1_700_100_000
    assert "end" not in first


def test_audit_is_listed_as_json(ledger):
    result = ledger("audit", "--subject", "acme/sql", "--json")
    assert [entry["details"] for entry in json.loads(result.stdout)] == [{"bytes": 5}] * 2
    assert ledger.requests[0].query["subject"] == "acme/sql"


def test_a_limit_tells_that_there_is_more(ledger):
    result = ledger("audit", "--limit", "1")
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == "there are more: raise --limit\n"


def test_a_server_without_the_call_is_told_from_one_without_the_name(tiny_server):
    result = CliRunner().invoke(app, ["--base-url", tiny_server.base_url, "adapters", "show", "x"])
    assert "`loraplex models` lists what the server knows" in result.stderr
    error = {"error": {"message": "GET /v1/usage: Not Found", "code": "not_found"}}
    with serve(lambda received: Reply(error, 404, {"x-request-id": "r1"})) as running:
        result = CliRunner().invoke(app, ["--base-url", running.url, "usage"])
    assert "the server has no such call; `loraplex doctor`" in result.stderr


def test_a_time_that_is_none_is_refused(ledger):
    result = ledger("usage", "--since", "yesterday")
    assert result.exit_code == 1
    assert "--since is a day or a time such as" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_writes_what_the_shell_can_read(shell, tmp_path):
    result = CliRunner().invoke(app, ["completion", shell])
    assert "_LORAPLEX_COMPLETE" in result.stdout
    if shutil.which(shell):
        script = tmp_path / "completion"
        script.write_text(result.stdout)
        subprocess.run([shell, "-n", str(script)], check=True, timeout=60)
