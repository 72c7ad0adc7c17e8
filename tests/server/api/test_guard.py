from __future__ import annotations

import httpx
import openai
import pytest

from loraplex_server.__main__ import main
from tests.server.api.conftest import BASE, make_adapter, running_server


@pytest.fixture(scope="module")
def locked(tmp_path_factory, vocabulary):
    with running_server(tmp_path_factory.mktemp("locked"), vocabulary, api_key="k3y") as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/v1/pool", "/docs", "/version"])
@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer k3"}, {"authorization": "k3y"}, {"x-api-key": "k3y"}]
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


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_and_scrapers_need_no_key(locked, path):
    assert httpx.get(locked.url + path).status_code == 200


def test_with_the_key_everything_is_open(locked):
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="k3y", max_retries=0) as client:
        assert client.models.list().data[0].id == BASE
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="other", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


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


@pytest.mark.parametrize(
    ("host", "key", "is_warned"),
    [("0.0.0.0", "", True), ("0.0.0.0", "k", False), ("127.0.0.1", "", False)],
)
def test_an_open_server_for_everybody_is_warned_of(
    host, key, is_warned, tmp_path, monkeypatch, caplog
):
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("LORAPLEX_API_KEY", key)
    argv = ["--model", str(tmp_path / "none.gguf"), "--port", "0", "--data-dir", str(tmp_path)]
    assert main([*argv, "--host", host]) == 1
    assert ("set LORAPLEX_API_KEY" in caplog.text) == is_warned
