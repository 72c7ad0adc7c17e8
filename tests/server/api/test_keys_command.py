from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loraplex_server.config import Config
from loraplex_server.keys_command import main
from loraplex_server.tenants.api_key import digest_of
from loraplex_server.tenants.key_database import has_keys, open_key_store
from tests.server.api.conftest import running_server
from tests.support.adapters import make_tensors
from tests.support.old_registries import write_registry_1


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    for name in ("LORAPLEX_API_KEY", "LORAPLEX_REGISTRY_URL", "LORAPLEX_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


def run(data_dir, *words: str) -> int:
    return main([*words, "--data-dir", str(data_dir)])


def test_a_shared_registry_is_all_that_keys_need(data_dir, capsys, monkeypatch):
    """Files of adapters, which a server needs too, are no matter of theirs."""
    monkeypatch.setenv("LORAPLEX_REGISTRY_URL", f"sqlite:///{data_dir.parent / 'registry'}")
    assert run(data_dir, "create", "--name", "ops", "--role", "admin", "--quiet") == 0
    config = Config(registry_url=f"sqlite:///{data_dir.parent / 'registry'}")
    with open_key_store(config) as store:
        assert [key.name for key in store.list(limit=9)] == ["ops"]
    capsys.readouterr()


def test_a_registry_that_cannot_be_opened_is_one_line_without_its_password(
    data_dir, capsys, monkeypatch
):
    urls = {
        "postgres://u:s3cret@127.0.0.1:1/x": "the registry does not answer",
        "postgresql://u:s3cret@127.0.0.1:s3cret/x": "written as %XX",
        "postgresql//u:s3cret@h/x": "postgresql://user:password@host/name",
    }
    for url, words in urls.items():
        monkeypatch.setenv("LORAPLEX_REGISTRY_URL", url)
        assert run(data_dir, "list") == 1
        told = capsys.readouterr().err
        assert words in told
        assert "s3cret" not in told


def test_keys_are_made_shown_and_revoked_without_a_server(data_dir, capsys):
    assert not has_keys(Config(data_dir=data_dir))
    assert run(data_dir, "create", "--name", "ops", "--role", "admin") == 0
    told = capsys.readouterr()
    secret = told.out.strip()
    assert (secret.startswith("lp-"), "not shown again" in told.err) == (True, True)
    create = ["create", "--name", "ci", "--role", "uploader", "--tenant", "acme"]
    assert run(data_dir, *create, "--expires-in", "90d", "--quiet") == 0
    told = capsys.readouterr()
    assert (told.out.count("\n"), told.err) == (1, "")
    assert run(data_dir, "list", "--json") == 0
    ops, ci = json.loads(capsys.readouterr().out)
    assert (ops["name"], ops["role"], ops["expires"]) == ("ops", "admin", None)
    assert (ci["tenant"], ci["expires"] - ci["created"]) == ("acme", 90 * 86_400)
    assert run(data_dir, "revoke", ci["id"]) == 0
    assert run(data_dir, "list") == 0
    listed = capsys.readouterr().out
    assert ops["id"] in listed
    assert ci["id"] not in listed
    config = Config(data_dir=data_dir)
    assert has_keys(config)
    with open_key_store(config) as store:
        assert store.read().by_digest.keys() == {digest_of(secret)}


def test_a_list_without_keys_says_whether_the_server_is_open_or_locked(data_dir, capsys):
    assert run(data_dir, "list") == 0
    assert "needs none" in capsys.readouterr().err
    assert run(data_dir, "create", "--name", "ops", "--role", "admin") == 0
    assert run(data_dir, "list", "--json") == 0
    (ops,) = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert run(data_dir, "revoke", ops["id"]) == 0
    capsys.readouterr()
    assert run(data_dir, "list") == 0
    assert "--all-and-open" in capsys.readouterr().err


def test_what_cannot_be_done_is_one_line(data_dir, capsys):
    assert run(data_dir, "create", "--name", "a", "--role", "user", "--tenant", "t") == 1
    assert "make a key of the role admin first" in capsys.readouterr().err
    assert run(data_dir, "revoke", "key_0") == 1
    assert "loraplex keys list" in capsys.readouterr().err
    for words in (["create", "--name", "a"], ["revoke"], ["create", "--expires-in", "1y"]):
        with pytest.raises(SystemExit) as caught:
            run(data_dir, *words)
        assert caught.value.code == 2


def test_a_running_server_takes_keys_that_the_command_makes(data_dir, vocabulary, capsys):
    with running_server(data_dir, vocabulary) as server, server.http() as http:
        assert http.get("/v1/models").status_code == 200
        assert run(data_dir, "create", "--name", "ops", "--role", "admin", "--quiet") == 0
        secret = capsys.readouterr().out.strip()
        server.app.state.tenants.keys._read_s -= 2  # as after two seconds of silence
        assert http.get("/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {secret}"}
        assert http.get("/v1/models", headers=headers).status_code == 200


def test_a_folder_of_the_first_release_is_left_to_the_server(data_dir, capsys):
    write_registry_1(data_dir, make_tensors())
    assert run(data_dir, "create", "--name", "a", "--role", "admin") == 1
    assert "start the server on it once" in capsys.readouterr().err


def test_the_client_becomes_this_command(data_dir):
    command = [sys.executable, "-c", "from loraplex.cli.app import app; app()", "keys", "list"]
    done = subprocess.run(
        [*command, "--data-dir", str(data_dir)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.startswith("ID")
