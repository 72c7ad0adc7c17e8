"""A server that starts before its registry's database does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy
from sqlalchemy.exc import ArgumentError

from loraplex_server.__main__ import main
from loraplex_server.adapters import registry_database
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.registry_database import open_database, wait_for_database
from tests.support.server_process import free_port


def absent_database() -> str:
    return f"postgresql://somebody:secret@127.0.0.1:{free_port()}/loraplex"


def test_a_database_that_comes_up_is_waited_for(postgres, caplog):
    url = sqlalchemy.make_url(postgres).set(database="comes_late")
    admin = sqlalchemy.create_engine(
        postgres.replace("postgresql", "postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    try:
        with ThreadPoolExecutor(1) as threads, admin.connect() as connection:
            waiting = threads.submit(wait_for_database, str(url), 60.0)
            for _ in range(600):
                if caplog.messages:
                    break
                time.sleep(0.05)
            assert not waiting.done()
            connection.exec_driver_sql("CREATE DATABASE comes_late")
            waiting.result(60)
        (line,) = caplog.messages
        assert line.startswith("waiting up to 60 s for the registry: ")
        assert "does not exist" in line
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql("DROP DATABASE IF EXISTS comes_late")
        admin.dispose()


def test_one_that_does_not_is_told_with_what_to_do():
    for attempt in (
        lambda url: wait_for_database(url, 0.0),
        lambda url: open_database(url, lambda adapter_id: None),
    ):
        with pytest.raises(StorageFailed, match=r"refused.*or correct registry_url") as failure:
            attempt(absent_database())
        assert "\n" not in str(failure.value)
        assert "secret" not in str(failure.value)


def test_a_url_that_is_none_is_not_shown(monkeypatch):
    def refuse(url: str, **options: object) -> None:  # as SQLAlchemy 2.0.0 does
        raise ArgumentError(f"Could not parse SQLAlchemy URL from string '{url}'")

    monkeypatch.setattr(registry_database, "create_engine", refuse)
    with pytest.raises(StorageFailed, match="is not a database URL") as failure:
        open_database("postgresql:/me:secret@host/loraplex", lambda adapter_id: None)
    assert "secret" not in str(failure.value)
    assert failure.value.__suppress_context__


def test_the_command_says_so_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORAPLEX_REGISTRY_URL", absent_database())
    flags = ["--data-dir", str(tmp_path / "data"), "--blob-url", str(tmp_path / "blobs")]
    assert main([*flags, "--port", "0", "--registry-wait-s", "0"]) == 1
    told = capsys.readouterr().err
    assert "the registry does not answer" in told
    assert "registry_wait_s (0 s)" in told


def test_a_signal_ends_the_wait(tmp_path):
    command = [sys.executable, "-m", "loraplex_server", "--port", "0"]
    command += ["--data-dir", str(tmp_path / "data"), "--blob-url", str(tmp_path / "blobs")]
    env = {**os.environ, "LORAPLEX_REGISTRY_URL": absent_database()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert any("waiting up to 60 s" in line for line in server.stderr)
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 130
        finally:
            server.kill()
