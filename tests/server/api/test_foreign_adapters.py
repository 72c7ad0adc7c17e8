"""The load and unload endpoints of vLLM and SGLang, answered as those servers answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from loraplex_server.api.foreign_adapters import source_of
from tests.server.api.conftest import BASE, Running, make_adapter, running_server, wait_until


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of adapters: `pirate`, `sql`, and one that is trained on another base."""
    root = tmp_path_factory.mktemp("root")
    make_adapter(root / "pirate")
    make_adapter(root / "sql models" / "v1", seed=1)
    make_adapter(root / "foreign", seed=2, base="another/base")
    make_adapter(root / "odd", seed=3)
    config = json.loads((root / "odd" / "adapter_config.json").read_text())
    config |= {"megatron_config": {"x": 1}, "what_is_this": 7}
    (root / "odd" / "adapter_config.json").write_text(json.dumps(config))
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def module_server(tmp_path_factory, vocabulary, root) -> Iterator[Running]:
    data_dir = tmp_path_factory.mktemp("data")
    with running_server(data_dir, vocabulary, adapter_root=root) as running:
        yield running


@pytest.fixture
def server(module_server) -> Iterator[Running]:
    yield module_server
    wait_until(lambda: module_server.engine.num_running == 0)
    for record in module_server.catalog.list():
        httpx.delete(f"{module_server.url}/v1/adapters/{record.name}")
    module_server.engine.reset()


def load(server, name: str, path: object, **fields) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return server.post("/v1/load_lora_adapter", body)


def unload(server, name: str, **fields) -> httpx.Response:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name, **fields})


def names(server) -> list[str]:
    return [record.name for record in server.catalog.list()]


def assert_text(answer: httpx.Response, text: str) -> None:
    assert (answer.status_code, answer.text) == (200, text)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def assert_vllm_error(answer: httpx.Response, status: int, kind: str, message: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert list(answer.json()) == ["error"]
    assert (error["type"], error["code"]) == (kind, status)
    assert message in error["message"]


# ---- vLLM ---------------------------------------------------------------------------------------


def test_vllms_pair_loads_serves_and_unloads(server, root):
    answer = load(server, "pirate", root / "pirate")
    assert_text(answer, "Success: LoRA adapter 'pirate' added successfully.")
    with server.openai() as client:
        assert client.completions.create(model="pirate", prompt="hello").model == "pirate"
        assert client.models.retrieve("pirate").parent == BASE
    adapter_id = server.catalog.get("pirate").id
    answer = unload(server, "pirate", lora_int_id=None)
    assert_text(answer, "Success: LoRA adapter 'pirate' removed successfully.")
    assert names(server) == []
    assert server.engine.discarded == [adapter_id]


@pytest.mark.parametrize("path", ["sql models/v1", "./sql models/v1", "{root}/sql models/v1"])
def test_paths_are_below_the_root_relative_or_absolute(server, root, path):
    answer = load(server, "sql", path.format(root=root))
    assert answer.status_code == 200, answer.text
    assert server.catalog.get("sql").source.startswith("file:")


def test_loading_again_needs_load_inplace(server, root):
    load(server, "pirate", "pirate")
    first = server.catalog.get("pirate").id
    answer = load(server, "pirate", "sql models/v1")
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": "The lora adapter 'pirate' has already been loaded. If you want to load "
            "the adapter in place, set 'load_inplace' to True.",
            "type": "InvalidUserInput",
            "param": None,
            "code": 400,
        }
    }
    assert server.catalog.get("pirate").id == first
    assert load(server, "pirate", "sql models/v1", load_inplace=True).status_code == 200
    assert server.catalog.get("pirate").id != first


def test_what_cannot_be_loaded_is_told_in_vllms_shape(server, root, tmp_path):
    missing = root / "nowhere"
    message = f"Loading lora x failed: No adapter found for {missing}"
    assert_vllm_error(load(server, "x", missing), 404, "NotFoundError", message)
    assert_vllm_error(load(server, "x", "empty"), 404, "NotFoundError", "No adapter found")
    both = "Both 'lora_name' and 'lora_path' must be provided."
    for body in (
        {},
        {"lora_name": "x"},
        {"lora_path": "pirate"},
        {"lora_name": "", "lora_path": ""},
    ):
        answer = server.post("/v1/load_lora_adapter", body)
        assert_vllm_error(answer, 400, "InvalidUserInput", both)
    base = load(server, BASE, "pirate")
    assert_vllm_error(base, 400, "InvalidUserInput", "is the base model's name")
    outside = make_adapter(tmp_path / "outside")
    assert_vllm_error(load(server, "x", outside), 403, "PermissionDeniedError", "adapter_root")
    assert_vllm_error(load(server, "x", "../x"), 403, "PermissionDeniedError", "adapter_root")
    assert_vllm_error(load(server, "x", "gopher:x"), 404, "NotFoundError", "No adapter found")
    threed = load(server, "x", "pirate", is_3d_lora_weight=True)
    assert_vllm_error(threed, 400, "InvalidUserInput", "is_3d_lora_weight")
    unknown = load(server, "x", "pirate", color="red")
    assert_vllm_error(unknown, 400, "InvalidUserInput", "unknown field `color`")
    assert names(server) == []


def test_a_refused_adapter_is_422_with_every_reason(server):
    for folder in ("odd", "foreign"):
        answer = load(server, "x", folder)
        assert_vllm_error(answer, 422, "UnprocessableEntityError", "is refused")
        assert answer.json()["error"]["reasons"]
    assert names(server) == []


def test_unloading_what_is_not_there_is_not_found(server, root):
    answer = unload(server, "nobody")
    assert answer.status_code == 404
    assert answer.json() == {
        "error": {
            "message": "The lora adapter 'nobody' cannot be found.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        }
    }
    message = "'lora_name' needs to be provided to unload a LoRA adapter."
    assert_vllm_error(server.post("/v1/unload_lora_adapter", {}), 400, "InvalidUserInput", message)
    load(server, "pirate", "pirate")
    version = f"pirate@{server.catalog.get('pirate').id}"
    assert_vllm_error(unload(server, version), 404, "NotFoundError", "cannot be found")
    with_id = unload(server, "pirate", lora_int_id=3)
    assert_vllm_error(with_id, 400, "InvalidUserInput", "lora_int_id")
    assert names(server) == ["pirate"]


@pytest.mark.parametrize("content", [b"{", b"[]", b""])
def test_bad_bodies_have_vllms_shape_too(server, content):
    headers = {"content-type": "application/json"}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = httpx.post(server.url + path, content=content, headers=headers)
        assert_vllm_error(answer, 400, "InvalidUserInput", "")


def test_running_requests_finish_before_unloading_answers(server):
    load(server, "pirate", "pirate")
    server.engine.step_s = 0.05
    answers = []

    def ask() -> None:
        with server.openai() as client:
            answers.append(client.completions.create(model="pirate", prompt="hello wor"))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: server.engine.num_running == 1)
    assert unload(server, "pirate").status_code == 200
    assert server.engine.num_running == 0
    asking.join()
    assert answers[0].choices[0].text == "hello wor"


# ---- SGLang -------------------------------------------------------------------------------------


def sglang(server, verb: str, **body) -> tuple[int, dict]:
    answer = server.post(f"/{verb}_lora_adapter", body)
    return answer.status_code, answer.json()


def test_sglangs_pair_tells_what_is_loaded(server, root):
    pirate, sql = root / "pirate", root / "sql models" / "v1"
    loaded = {"pirate": f"file://{pirate}"}
    expected = {"success": True, "error_message": "", "loaded_adapters": loaded}
    assert sglang(server, "load", lora_name="pirate", lora_path=str(pirate)) == (200, expected)
    loaded["sql"] = source_of(str(sql), root)
    answer = sglang(server, "load", lora_name="sql", lora_path=str(sql), pinned=False)
    assert answer == (200, expected)
    del loaded["pirate"]
    assert sglang(server, "unload", lora_name="pirate") == (200, expected)
    assert names(server) == ["sql"]


def test_sglangs_pin_is_ours(server):
    status, _ = sglang(server, "load", lora_name="pirate", lora_path="pirate", pinned=True)
    record = server.catalog.get("pirate")
    assert (status, record.settings.pinned) == (200, True)
    assert server.engine.kept == {record.id}


def test_a_pin_that_does_not_fit_leaves_nothing(server, monkeypatch):
    from tests.support import fake_engine

    tiny = fake_engine.dataclasses.replace(fake_engine.INFO, num_pages=1)
    monkeypatch.setattr(fake_engine, "INFO", tiny)
    status, body = sglang(server, "load", lora_name="pirate", lora_path="pirate", pinned=True)
    assert (status, body["success"]) == (400, False)
    assert "pinned" in body["error_message"]
    assert names(server) == []


@pytest.mark.parametrize(
    ("verb", "body", "message"),
    [
        ("unload", {"lora_name": "nobody"}, "LoRA with name nobody does not exist."),
        ("load", {"lora_name": "x", "lora_path": "nowhere"}, "No adapter found for nowhere"),
        ("load", {"lora_name": "x", "lora_path": "odd"}, "is refused"),
        ("load", {"lora_name": "x"}, "`lora_path` is required"),
        ("load", {"lora_name": "", "lora_path": "pirate"}, "lora_name"),
        ("load", {"lora_name": "x", "lora_path": "pirate", "lora_id": "1"}, "lora_id"),
        ("load", {"lora_name": BASE, "lora_path": "pirate"}, "base model's name"),
        ("unload", {}, "`lora_name` is required"),
    ],
)
def test_sglangs_failures_are_400_with_the_reason(server, verb, body, message):
    status, answer = sglang(server, verb, **body)
    assert status == 400
    assert answer["success"] is False
    assert answer["loaded_adapters"] is None
    assert message in answer["error_message"]
    assert set(answer) <= {"success", "error_message", "loaded_adapters", "reasons"}


def test_sglang_never_replaces(server):
    sglang(server, "load", lora_name="pirate", lora_path="pirate")
    status, answer = sglang(server, "load", lora_name="pirate", lora_path="sql models/v1")
    assert (status, answer["error_message"]) == (400, "LoRA with name pirate already exists.")


# ---- both ---------------------------------------------------------------------------------------


def test_without_a_root_no_path_can_be_read(tmp_path, vocabulary):
    with running_server(tmp_path / "data", vocabulary) as running:
        make_adapter(tmp_path / "pirate")
        answer = load(running, "pirate", tmp_path / "pirate")
        assert_vllm_error(answer, 403, "PermissionDeniedError", "adapter_root")


def test_the_key_guards_them(tmp_path, vocabulary, root):
    settings = {"adapter_root": root, "api_key": "secret"}
    with running_server(tmp_path / "data", vocabulary, **settings) as running:
        body = {"lora_name": "pirate", "lora_path": "pirate"}
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            assert running.post(path, body).status_code == 401
        headers = {"authorization": "Bearer secret"}
        answer = httpx.post(f"{running.url}/load_lora_adapter", json=body, headers=headers)
        assert answer.status_code == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret") as client:
            assert client.models.delete("pirate").deleted
