from __future__ import annotations

import httpx
import openai
import pytest

from loraplex_server import keys_command
from loraplex_server.__main__ import main
from tests.server.api.conftest import BASE, make_adapter, running_server


@pytest.fixture(scope="module")
def locked(tmp_path_factory, vocabulary):
    with running_server(tmp_path_factory.mktemp("locked"), vocabulary, api_key="k3y") as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/v1/pool", "/docs", "/version"])
@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer k3"}, {"authorization": "k3y"}, {"x-api-key": "k3"}]
)
def test_without_the_key_everything_is_closed(locked, path, headers):
    answer = httpx.get(locked.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


def test_an_upload_without_the_key_is_answered_not_cut_off(locked, tmp_path):
    assert locked.upload("pirate", make_adapter(tmp_path / "a")).status_code == 401
    files = {"archive": ("a.zip", b"x" * (8 << 20))}
    assert httpx.post(f"{locked.url}/v1/adapters", files=files, timeout=20).status_code == 401


def test_the_key_may_come_as_anthropics_clients_send_it(locked):
    url = f"{locked.url}/v1/models"
    assert httpx.get(url, headers={"x-api-key": "k3y"}).status_code == 200
    both = {"x-api-key": "k3y", "authorization": "Bearer k3y"}
    assert httpx.get(url, headers=both).status_code == 200
    answer = httpx.get(url, headers=both | {"x-api-key": "other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_metrics_can_be_closed(tmp_path, vocabulary):
    settings = {"api_key": "k3y", "metrics_open": False}
    with running_server(tmp_path, vocabulary, **settings) as closed:
        assert httpx.get(f"{closed.url}/metrics").status_code == 401
        headers = {"authorization": "Bearer k3y"}
        assert httpx.get(f"{closed.url}/metrics", headers=headers).status_code == 200
        assert httpx.get(f"{closed.url}/health").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_and_scrapers_need_no_key(locked, path):
    assert httpx.get(locked.url + path).status_code == 200


def test_nobody_without_a_key_learns_of_the_database(tmp_path, vocabulary):
    with running_server(tmp_path, vocabulary) as running:
        keys = running.app.state.tenants.keys
        with running.app.state.tenants.key_store._database.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE key_changes RENAME TO key_changes_gone")
        keys._read_s -= 60
        answer = httpx.get(f"{running.url}/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_failed")
    assert "key_changes" not in answer.text


def test_with_the_key_everything_is_open(locked):
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="k3y", max_retries=0) as client:
        assert client.models.list().data[0].id == BASE
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="other", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("host.docker.internal:8000", 200),
        ("loraplex", 200),
        ("[x.y", 403),
    ],
)
def test_without_keys_no_domain_of_others_stands_for_the_server(server, host, status):
    answer = httpx.get(f"{server.url}/v1/models", headers={"host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "cross_site"


def test_with_keys_or_left_open_a_server_may_be_called_anything(locked, tmp_path, vocabulary):
    headers = {"host": "llm.example.com"}
    with running_server(tmp_path, vocabulary, allow_open=True) as open_to_all:
        assert httpx.get(f"{open_to_all.url}/v1/models", headers=headers).status_code == 200
    answer = httpx.get(f"{locked.url}/v1/models", headers=headers | {"x-api-key": "k3y"})
    assert answer.status_code == 200


def test_another_sites_page_changes_nothing(server, tmp_path):
    headers = {"sec-fetch-site": "cross-site"}
    posted = httpx.post(f"{server.url}/v1/adapters", files={"name": b"x"}, headers=headers)
    deleted = httpx.delete(f"{server.url}/v1/adapters/x", headers=headers)
    assert [posted.status_code, deleted.status_code] == [403, 403]
    assert posted.json()["error"]["code"] == "cross_site"
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    headers = {"sec-fetch-site": "same-origin"}
    assert httpx.delete(f"{server.url}/v1/adapters/x", headers=headers).status_code == 404
    patched = httpx.patch(
        f"{server.url}/v1/adapters/x",
        json={"pinned": True},
        headers={"sec-fetch-site": "cross-site"},
    )
    assert (patched.status_code, patched.json()["error"]["code"]) == (403, "cross_site")


def start(tmp_path, capsys, *flags: str) -> str:
    """Start a server whose model is not there, and return what it said."""
    argv = ["--model", str(tmp_path / "none.gguf"), "--port", "0", "--data-dir", str(tmp_path)]
    assert main([*argv, *flags]) == 1
    return capsys.readouterr().err


def test_a_server_without_keys_does_not_listen_for_others(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)
    refusal = start(tmp_path, capsys, "--host", "0.0.0.0")
    assert f"loraplex keys create --name me --role admin --data-dir {tmp_path}" in refusal
    assert "--allow-open on" in refusal
    assert "none.gguf" in start(tmp_path, capsys, "--host", "127.0.0.1")
    assert "none.gguf" in start(tmp_path, capsys, "--host", "0.0.0.0", "--allow-open", "on")
    assert not (tmp_path / "catalog.sqlite3").exists()
    monkeypatch.setenv("LORAPLEX_API_KEY", "k")
    assert "none.gguf" in start(tmp_path, capsys, "--host", "0.0.0.0")


def test_with_a_key_in_the_data_folder_it_does(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)
    create = ["create", "--name", "me", "--role", "admin", "--data-dir", str(tmp_path)]
    assert keys_command.main(create) == 0
    assert "none.gguf" in start(tmp_path, capsys, "--host", "0.0.0.0")
    assert keys_command.main(["revoke", "--all-and-open", "--data-dir", str(tmp_path)]) == 0
    assert "keys create" in start(tmp_path, capsys, "--host", "0.0.0.0")
