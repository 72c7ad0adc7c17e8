from __future__ import annotations

import contextlib
import io
import json
import socket
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import openai
import pytest

from loraplex_server.api import uploads
from loraplex_server.engine.messages import EngineStats
from tests.server.api.conftest import BASE, MAX_UPLOAD_BYTES, make_adapter, wait_until


@pytest.fixture
def folder(tmp_path):
    return make_adapter(tmp_path / "adapter")


def staged(server) -> list[str]:
    """What lies in the data folder beside the registered adapters."""
    quarantine = [path for path in server.data_dir.rglob("*") if "staging" in path.parts]
    return [str(path) for path in quarantine if path.is_file()]


def test_an_upload_is_registered_and_served(server, client, folder):
    answer = server.upload("pirate", folder)
    assert answer.status_code == 201
    record = answer.json()
    assert record["object"] == "adapter"
    assert record["name"] == "pirate"
    assert record["id"].startswith("sha256:")
    assert record["base_model"] == BASE
    assert (record["rank_max"], record["target_modules"]) == (4, ["q"])
    assert record["state"] == "registered"
    assert record["size_bytes"] > 0
    assert record["pool_pages"] >= 1
    reply = client.completions.create(model="pirate", prompt="hello")
    assert (reply.model, reply.choices[0].text) == ("pirate", "hello")
    assert server.engine.submitted[0].adapter.adapter_id == record["id"]
    assert staged(server) == []


def test_the_state_follows_the_engine(server, folder):
    record = server.upload("pirate", folder).json()
    path = f"{server.url}/v1/adapters/pirate"
    server.engine.stats = EngineStats(loading=(record["id"],))
    assert httpx.get(path).json()["state"] == "loading"
    server.engine.stats = EngineStats(resident={record["id"]: 3})
    assert httpx.get(path).json()["state"] == "resident"


def test_the_same_content_again_changes_nothing(server, folder):
    first = server.upload("pirate", folder)
    second = server.upload("pirate", folder)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()


def test_other_content_under_a_taken_name_is_a_conflict(server, folder, tmp_path):
    server.upload("pirate", folder)
    answer = server.upload("pirate", make_adapter(tmp_path / "other", seed=1))
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "adapter_name_taken"
    assert answer.headers["x-should-retry"] == "false"


def test_a_refused_adapter_gets_the_list_of_reasons(server, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "what": 1}))
    answer = server.upload("pirate", folder)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "adapter_refused"
    assert len(error["reasons"]) >= 1
    assert staged(server) == []


def test_the_base_check_can_be_waived(server, tmp_path):
    folder = make_adapter(tmp_path / "adapter", base="another/base")
    assert server.upload("pirate", folder).status_code == 422
    assert server.upload("pirate", folder, check_base="false").status_code == 201


def zip_of(folder) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return buffer.getvalue()


def tar_of(folder) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, "adapter")
    return buffer.getvalue()


@pytest.mark.parametrize(("filename", "pack"), [("a.zip", zip_of), ("a.tar.gz", tar_of)])
def test_an_archive_of_the_folder_works_too(server, folder, filename, pack):
    files = {"archive": (filename, pack(folder))}
    with server.http() as http:
        answer = http.post("/v1/adapters", data={"name": "pirate"}, files=files)
    assert answer.status_code == 201, answer.text


def test_the_name_may_come_after_the_files(server, folder):
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    with server.http() as http:
        answer = http.post("/v1/adapters", files=[*files, ("name", (None, b"pirate"))])
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([("name", (None, b"x"))], 400, "invalid_upload"),
        ([("files", ("adapter_config.json", b"{}"))], 400, "invalid_request"),
        ([("name", (None, b"x")), ("files", ("evil.bin", b"x"))], 400, "invalid_upload"),
        ([("name", (None, b"x")), ("files", ("../x.json", b"x"))], 400, "invalid_upload"),
        ([("name", (None, b"x")), ("color", (None, b"red"))], 400, "invalid_request"),
        ([("name", (None, b"x")), ("name", (None, b"y"))], 400, "invalid_request"),
        ([("name", (None, b"x" * 5000))], 400, "invalid_request"),
        ([("name", (None, b"../up"))], 400, "invalid_adapter_name"),
        ([("name", (None, BASE.encode()))], 400, "invalid_adapter_name"),
        ([("name", (None, b"\xff"))], 400, "invalid_upload"),
        ([("name", (None, b"x")), ("check_base", (None, b"maybe"))], 400, "invalid_request"),
        ([("name", (None, b"x")), ("archive", ("a.zip", b"no zip"))], 400, "invalid_upload"),
        ([("files", (None, b"x"))], 400, "invalid_upload"),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(server, parts, status, code):
    with server.http() as http:
        answer = http.post("/v1/adapters", files=parts)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert staged(server) == []
    assert server.catalog.list() == ()


NAME_PART = b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nx'


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"garbage", "multipart/form-data; boundary=b"),
        (b"--b\r\n", "multipart/form-data; boundary=b"),
        (NAME_PART, "multipart/form-data; boundary=b"),
        (b"--b--\r\n", "multipart/form-data; boundary=" + "b" * 500),
    ],
)
def test_a_body_that_is_no_form_is_a_bad_request(server, content, content_type):
    headers = {"content-type": content_type}
    answer = httpx.post(f"{server.url}/v1/adapters", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert staged(server) == []


@pytest.mark.parametrize("has_length", [True, False])
def test_an_upload_beyond_the_limit_is_cut_off(server, has_length):
    head = (
        b'--b\r\ncontent-disposition: form-data; name="files"; '
        b'filename="adapter_model.safetensors"\r\n\r\n'
    )
    pieces = [head] + [b"x" * 65536] * (2 * MAX_UPLOAD_BYTES // 65536)
    content = b"".join(pieces) if has_length else iter(pieces)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    with server.http() as http:
        answer = http.post("/v1/adapters", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "upload_too_large"
    assert staged(server) == []


def test_a_client_gone_in_the_middle_leaves_nothing(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n"
            b"content-type: multipart/form-data; boundary=b\r\n\r\n"
            b'--b\r\ncontent-disposition: form-data; name="files"; '
            b'filename="adapter_model.safetensors"\r\n\r\n' + b"x" * 500_000
        )
        staging = server.data_dir / "staging"
        wait_until(lambda: any(staging.iterdir()))
    wait_until(lambda: not any(staging.iterdir()))
    assert server.catalog.list() == ()


def test_two_uploads_of_one_name_at_once_make_one_adapter(server, tmp_path):
    folders = [make_adapter(tmp_path / str(seed), seed=seed) for seed in range(2)]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda f=f: statuses.append(server.upload("x", f).status_code))
        for f in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201, 409]


def test_the_list_goes_page_by_page(server, tmp_path):
    folder = make_adapter(tmp_path / "adapter")
    for name in "abc":
        server.upload(name, folder)
    with server.http() as http:
        first = http.get("/v1/adapters", params={"limit": 2}).json()
        assert [record["name"] for record in first["data"]] == ["a", "b"]
        assert (first["has_more"], first["last"]) == (True, "b")
        second = http.get("/v1/adapters", params={"limit": 2, "after": first["last"]}).json()
        assert [record["name"] for record in second["data"]] == ["c"]
        assert second["has_more"] is False
        empty = http.get("/v1/adapters", params={"after": "c"}).json()
        assert (empty["data"], empty["last"]) == ([], None)
        assert http.get("/v1/adapters", params={"limit": 0}).json()["error"]["param"] == "limit"


def test_an_adapter_is_deleted_by_name_and_its_pages_discarded(server, adapter):
    path = f"{server.url}/v1/adapters/{quote(adapter, safe='')}"
    record = httpx.get(path).json()
    assert httpx.delete(path).json() == {
        "object": "adapter.deleted",
        "name": adapter,
        "id": record["id"],
        "deleted": True,
        "freed": {"pool_bytes": 0, "host_bytes": 0, "disk_bytes": record["size_bytes"]},
    }
    assert server.engine.discarded == [record["id"]]
    again = httpx.delete(path)
    assert again.status_code == 404
    assert again.json()["error"]["code"] == "adapter_not_found"


def test_models_are_the_base_and_its_adapters(client, adapter):
    base, model = client.models.list().data
    assert (base.id, base.parent, base.max_model_len) == (BASE, None, 256)
    assert (model.id, model.parent, model.max_model_len) == (adapter, BASE, 256)
    assert model.root.startswith("sha256:")
    assert client.models.retrieve(adapter).id == adapter
    assert client.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_openais_delete_takes_an_adapter_but_not_the_base(server, client, adapter):
    assert client.models.delete(adapter).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.models.delete(adapter)
    with pytest.raises(openai.BadRequestError):
        client.models.delete(BASE)


def test_half_a_surrogate_pair_in_a_config_is_a_bad_request(server, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    for field in ("base_model_name_or_path", "revision"):
        text = json.dumps(config | {field: "\ud800"})
        (folder / "adapter_config.json").write_text(text)
        answer = server.upload("pirate", folder, check_base="false")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_upload")
    assert server.catalog.list() == ()


FORM = "multipart/form-data; boundary=b"
WEIGHTS_PART = (
    b'--b\r\ncontent-disposition: form-data; name="files"; '
    b'filename="adapter_model.safetensors"\r\n\r\n'
)


@contextlib.contextmanager
def open_upload(server):
    """Begin an upload and go silent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            f"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n"
            f"content-type: {FORM}\r\n\r\n".encode()
            + WEIGHTS_PART
        )
        yield connection


def test_only_so_many_uploads_are_open_at_once(server, folder, monkeypatch):
    monkeypatch.setattr(uploads, "_MAX_OPEN", 2)
    staging = server.data_dir / "staging"
    with open_upload(server), open_upload(server):
        wait_until(lambda: len([*staging.iterdir()]) == 2)
        refused = server.upload("pirate", folder)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_uploads"
        assert int(refused.headers["retry-after"]) > 0
    wait_until(lambda: not any(staging.iterdir()))
    assert server.upload("pirate", folder).status_code == 201


def test_others_are_received_and_refused_while_adapters_are_read(server, folder, monkeypatch):
    """As many as are read at once, for as long as it takes: then come more than are received."""
    gate, at_work = threading.Event(), threading.Semaphore(0)
    register = server.catalog.register

    def wait_and_register(*args, **options):
        at_work.release()
        assert gate.wait(20)
        return register(*args, **options)

    monkeypatch.setattr(server.catalog, "register", wait_and_register)
    with ThreadPoolExecutor() as others:
        names = [f"slow-{index}" for index in range(5)]
        slow = [others.submit(server.upload, name, folder) for name in names]
        assert all(at_work.acquire(timeout=20) for _ in range(2))
        assert not at_work.acquire(timeout=0.1), "more are read at once"
        assert server.upload("", folder).status_code == 400
        gate.set()
        assert [answer.result().status_code for answer in slow] == [201] * 5


def test_a_silent_sender_is_given_up(server, monkeypatch):
    monkeypatch.setattr(uploads, "_IDLE_S", 0.1)
    with open_upload(server) as connection:
        answer = connection.recv(65536)
        while b"}}" not in answer:
            answer += connection.recv(65536)
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert b"upload_timeout" in answer
    wait_until(lambda: not any((server.data_dir / "staging").iterdir()))
