"""Naming an adapter: by `model` in several spellings, or beside it."""

from __future__ import annotations

import openai
import pytest

from loraplex import Client
from loraplex_server.api.adapter_access import AdapterAccess
from loraplex_server.api.model_names import ModelNames, ModelWish, Naming
from loraplex_server.tenants.namespace import Namespace
from loraplex_server.tenants.principal import ANYBODY
from tests.server.api.conftest import BASE, make_adapter, wait_until


@pytest.fixture
def pirate(server, tmp_path) -> str:
    """The content id of the adapter `pirate`."""
    return upload(server, "pirate", tmp_path / "pirate")


def upload(server, name: str, folder, seed: int = 0) -> str:
    answer = server.upload(name, make_adapter(folder, seed=seed))
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def answered_by(server) -> str | None:
    adapter = server.engine.submitted[-1].adapter
    return adapter.adapter_id if adapter else None


def complete(server, **fields):
    return server.post("/v1/completions", {"prompt": "hello", **fields})


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"model": "pirate"}, "pirate"),
        ({"model": f"{BASE}:pirate"}, f"{BASE}:pirate"),
        ({"model": BASE, "lora_path": "pirate"}, "pirate"),
        ({"model": BASE, "lora_path": ["pirate"]}, "pirate"),
        ({"model": BASE, "adapter_id": "pirate"}, "pirate"),
        ({"model": "", "adapter_id": "pirate"}, "pirate"),
        ({"adapter_id": "pirate"}, "pirate"),
        ({"lora_path": "pirate"}, "pirate"),
        ({"model": "pirate", "lora_path": "pirate"}, "pirate"),
        ({"model": f"{BASE}:pirate", "lora_path": ["pirate"]}, f"{BASE}:pirate"),
        ({"model": "pirate", "lora_path": None, "adapter_id": None}, "pirate"),
        ({"model": None, "adapter_id": "pirate", "lora_path": [None]}, "pirate"),
    ],
)
def test_every_servers_way_to_name_an_adapter_works(server, pirate, fields, shown):
    answer = complete(server, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == shown
    assert answered_by(server) == pirate


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"model": BASE}, BASE),
        ({"model": BASE, "adapter_id": ""}, BASE),
        ({"model": BASE, "lora_path": [None]}, BASE),
        ({"model": BASE, "adapter_id": BASE}, BASE),
        ({"model": "", "adapter_id": ""}, BASE),
        ({"adapter_id": ""}, BASE),
        ({"lora_path": [""]}, BASE),
    ],
)
def test_and_so_do_their_ways_to_name_the_base_model(server, pirate, fields, shown):
    answer = complete(server, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == shown
    assert answered_by(server) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"model": f"{BASE}:nobody"}, "model"),
        ({"model": f"{BASE}:"}, "model"),
        ({"model": f"{BASE}:{BASE}"}, "model"),
        ({"model": "other-base:pirate"}, "model"),
        ({"model": f"{BASE}::pirate"}, "model"),
        ({"model": "tiny:pirate"}, "model"),
        ({"model": BASE, "lora_path": "nobody"}, "lora_path"),
        ({"model": BASE, "adapter_id": "nobody"}, "adapter_id"),
        ({"model": BASE, "adapter_id": f"{BASE}:pirate"}, "adapter_id"),
        ({"model": "pirate", "adapter_id": "nobody"}, "adapter_id"),
    ],
)
def test_a_name_that_nobody_has_is_not_found_and_never_the_base(server, pirate, fields, param):
    answer = complete(server, **fields)
    assert answer.status_code == 404, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", param)
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "both"),
    [
        ({"model": "pirate", "adapter_id": "sql"}, ("model", "adapter_id")),
        ({"model": "pirate", "lora_path": "sql"}, ("model", "lora_path")),
        ({"model": BASE, "adapter_id": "pirate", "lora_path": "sql"}, ("adapter_id", "lora_path")),
        ({"model": "pirate", "adapter_id": ""}, ("model", "adapter_id")),
        ({"adapter_id": "", "lora_path": "sql"}, ("adapter_id", "lora_path")),
        ({"model": f"{BASE}:pirate", "lora_path": "sql"}, ("model", "lora_path")),
    ],
)
def test_two_names_at_once_are_refused_naming_both(server, pirate, tmp_path, fields, both):
    sql = upload(server, "sql", tmp_path / "sql", seed=1)
    answer = complete(server, **fields)
    assert answer.status_code == 400, answer.text
    assert all(f"`{param}`" in answer.json()["error"]["message"] for param in both)
    assert server.engine.submitted == []
    assert server.catalog.num_leases(pirate) == server.catalog.num_leases(sql) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`model` is required"),
        ({"model": ""}, "`model` is required"),
        ({"model": None}, "`model` is required"),
        ({"model": BASE, "lora_path": ["a", "b"]}, "one name"),
        ({"model": BASE, "lora_path": []}, "one name"),
        ({"model": BASE, "lora_path": 7}, "lora_path"),
        ({"model": BASE, "adapter_id": 7}, "adapter_id"),
        ({"model": BASE, "lora": "pirate"}, "unknown field `lora`"),
    ],
)
def test_what_names_nothing_is_a_bad_request(server, fields, message):
    answer = complete(server, **fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_an_adapter_that_is_called_so_wins_over_the_prefix(server, pirate, tmp_path):
    """A colon in a name is a character like any other."""
    own = upload(server, f"{BASE}:pirate", tmp_path / "own", seed=1)
    complete(server, model=f"{BASE}:pirate")
    assert answered_by(server) == own
    complete(server, model=f"{BASE}:{BASE}:pirate")
    assert answered_by(server) == own
    other = upload(server, "v1:pirate", tmp_path / "other", seed=2)
    complete(server, model="v1:pirate")
    assert answered_by(server) == other
    complete(server, model=f"{BASE}:v1:pirate")
    assert answered_by(server) == other


def test_a_base_model_with_a_colon_in_its_name_is_one_prefix(server, pirate):
    names = ModelNames(AdapterAccess(server.catalog), ("qwen:0.5b", "qwen"))
    for text in ("qwen:0.5b:pirate", "qwen:pirate", "pirate"):
        answerer = names.acquire(ModelWish((Naming("model", text),)), Namespace(ANYBODY))
        assert answerer.record is not None
        assert answerer.record.id == pirate
        answerer.release()
    assert (
        names.acquire(ModelWish((Naming("model", "qwen:0.5b"),)), Namespace(ANYBODY)).record is None
    )


def test_a_version_is_named_by_its_digest(server, pirate):
    for name in (f"pirate@{pirate}", f"pirate@{pirate[:25]}", f"{BASE}:pirate@{pirate}"):
        answer = complete(server, model=name)
        assert answer.status_code == 200, answer.text
        assert answered_by(server) == pirate
        assert answer.json()["model"] == name
    assert complete(server, model="pirate", adapter_id=f"pirate@{pirate}").status_code == 200
    other = "sha256:" + "0" * 64
    assert complete(server, model=f"pirate@{other}").status_code == 404


def test_the_real_clients_can_say_it_too(server, client, pirate):
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    answer = client.chat.completions.create(model=f"{BASE}:pirate", **chat)
    assert (answer.model, answered_by(server)) == (f"{BASE}:pirate", pirate)
    client.chat.completions.create(model=BASE, extra_body={"lora_path": "pirate"}, **chat)
    assert answered_by(server) == pirate
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="hello")
    assert caught.value.param == "model"
    with Client(base_url=server.url) as own:
        answer = own.completions.create(model=BASE, prompt="hello", adapter_id="pirate")
        assert (answer.model, answered_by(server)) == ("pirate", pirate)
        stream = own.chat.create(stream=True, model=f"{BASE}:pirate", **chat)
        assert {chunk.model for chunk in stream} == {f"{BASE}:pirate"}


def test_leases_end_however_the_adapter_was_named(server, pirate):
    for fields in ({"model": f"{BASE}:pirate"}, {"model": "pirate", "lora_path": "pirate"}):
        complete(server, **fields)
    wait_until(lambda: server.catalog.num_leases(pirate) == 0)
