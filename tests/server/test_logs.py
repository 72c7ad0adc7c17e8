"""How the processes of the server write their logs."""

from __future__ import annotations

import json
import logging

import pytest

from loraplex_server.logs import JsonFormatter, without_password


@pytest.mark.parametrize(("rank", "named"), [(None, {}), (3, {"rank": 3})])
def test_a_json_line_names_the_rank_of_a_process_that_has_one(rank, named):
    record = logging.LogRecord("a.b", logging.INFO, "f.py", 1, "it is %s", ("on",), None)
    written = json.loads(JsonFormatter(rank).format(record))
    del written["time"]
    assert written == {"level": "info", "logger": "a.b", "message": "it is on", **named}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me:pass@w@rd@host/folder", "sftp://host/folder"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/data/a@b", "/data/a@b"),
    ],
)
def test_a_password_in_a_url_is_not_logged(url, shown):
    assert without_password(url) == shown
