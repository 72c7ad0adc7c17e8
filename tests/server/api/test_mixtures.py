"""Scales and mixtures of adapters: what a request may ask for, and what the engine is told."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file, save_file

from loraplex import Client
from loraplex_server.adapters.defaults import AdapterDefaults
from tests.server.api.conftest import BASE, make_adapter, wait_until


@pytest.fixture
def ids(server, tmp_path) -> dict[str, str]:
    """The content ids of the adapters `pirate` and `sql`."""
    found = {}
    for seed, name in enumerate(("pirate", "sql")):
        answer = server.upload(name, make_adapter(tmp_path / name, seed=seed))
        assert answer.status_code == 201, answer.text
        found[name] = answer.json()["id"]
    return found


def complete(server, **fields):
    return server.post("/v1/completions", {"prompt": "hello", **fields})


def told(server) -> list[tuple[str, float]]:
    """What the engine was told of adapters."""
    return [
        (manifest.adapter_id, weight) for manifest, weight in server.engine.submitted[-1].adapters
    ]


def mixture(*parts: tuple[str, float]) -> list[dict]:
    return [{"name": name, "weight": weight} for name, weight in parts]


def test_a_scale_weighs_the_one_adapter(server, ids):
    for fields in ({"model": "pirate"}, {"model": f"{BASE}:pirate"}, {"lora_path": "pirate"}):
        assert complete(server, adapter_scale=0.25, **fields).status_code == 200
        assert told(server) == [(ids["pirate"], 0.25)]
    for scale in (-1.5, 0, 1.0, None):
        assert complete(server, model="pirate", adapter_scale=scale).status_code == 200
        assert told(server) == [(ids["pirate"], 1.0 if scale is None else scale)]


@pytest.mark.parametrize("model", [{"model": BASE}, {"model": ""}, {}])
def test_a_mixture_is_told_in_its_order(server, ids, model):
    wish = [{"name": "sql", "weight": 0.5}, {"name": "pirate"}]
    answer = complete(server, adapters=wish, **model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == BASE
    assert told(server) == [(ids["sql"], 0.5), (ids["pirate"], 1.0)]


def test_versions_can_be_mixed_too(server, ids):
    wish = mixture((f"pirate@{ids['pirate']}", 0.5), ("sql", 2.0))
    assert complete(server, adapters=wish).status_code == 200
    assert told(server) == [(ids["pirate"], 0.5), (ids["sql"], 2.0)]


def test_one_content_under_two_names_is_one_adapter(server, ids, tmp_path):
    server.upload("corsair", make_adapter(tmp_path / "corsair", seed=0))
    wish = mixture(("pirate", 0.5), ("sql", 1.0), ("corsair", 0.25))
    assert complete(server, adapters=wish).status_code == 200
    assert told(server) == [(ids["pirate"], 0.75), (ids["sql"], 1.0)]


def test_every_lease_ends_with_the_request(server, ids):
    complete(server, adapters=mixture(("pirate", 0.5), ("sql", 0.5)))
    for adapter_id in ids.values():
        wait_until(lambda i=adapter_id: server.catalog.num_leases(i) == 0)


def test_deleting_one_of_a_mixture_waits_for_it_or_cancels_it(server, ids):
    server.engine.step_s = 5.0  # it is still running when the delete arrives
    body = {"prompt": "hello wor", "stream": True}
    body["adapters"] = mixture(("pirate", 0.5), ("sql", 0.5))
    with (
        server.http() as http,
        http.stream("POST", "/v1/completions", json=body) as stream,
        server.http() as other,
    ):
        wait_until(lambda: server.engine.num_running == 1)
        answer = other.delete("/v1/adapters/sql", params={"mode": "cancel"})
        assert answer.status_code == 200, answer.text
        assert server.engine.num_running == 0
        assert "adapter_deleted" in stream.read().decode()
    wait_until(lambda: server.catalog.num_leases(ids["pirate"]) == 0)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": BASE, "adapter_scale": 0.5}, 400, "adapter_scale"),
        ({"model": "pirate", "adapter_scale": 101}, 400, "adapter_scale"),
        ({"model": "pirate", "adapter_scale": "much"}, 400, "adapter_scale"),
        ({"model": "pirate", "adapters": mixture(("sql", 1))}, 400, "adapters"),
        ({"adapter_id": "", "adapters": mixture(("sql", 1))}, 400, "adapters"),
        ({"lora_path": "pirate", "adapters": mixture(("sql", 1))}, 400, "adapters"),
        ({"adapters": mixture(("sql", 1)), "adapter_scale": 0.5}, 400, "adapter_scale"),
        ({"adapters": mixture(("sql", 1), ("sql", 2))}, 400, "adapters[1].name"),
        ({"adapters": mixture((BASE, 1), ("sql", 2))}, 400, "adapters[0].name"),
        ({"adapters": mixture(("pirate", 1), ("nobody", 2))}, 404, "adapters[1].name"),
        ({"adapters": []}, 400, "adapters"),
        ({"adapters": mixture(*[("sql", 1)] * 9)}, 400, "adapters"),
        ({"adapters": [{"name": "sql", "scale": 1}]}, 400, "adapters[0].scale"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters[0].name"),
        ({"adapters": mixture(("sql", 1000))}, 400, "adapters[0].weight"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(server, ids, fields, status, param):
    answer = complete(server, **fields)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert server.engine.submitted == []
    assert all(server.catalog.num_leases(adapter_id) == 0 for adapter_id in ids.values())


def test_what_does_more_than_add_can_be_neither_scaled_nor_mixed(server, ids, tmp_path):
    folder = make_dora(tmp_path / "dora")
    assert server.upload("dora", folder).status_code == 201
    dora_id = server.catalog.get("dora").id
    mixed = {"adapters": mixture(("sql", 1), ("dora", 1))}
    for fields, param in (
        ({"model": "dora", "adapter_scale": 0.5}, "adapter_scale"),
        (mixed, "adapters"),
    ):
        answer = complete(server, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "`dora`" in answer.json()["error"]["message"]
    assert server.catalog.num_leases(dora_id) == 0
    for fields in ({"adapter_scale": 1.0, "model": "dora"}, {"adapters": mixture(("dora", 1))}):
        assert complete(server, **fields).status_code == 200
        assert told(server) == [(dora_id, 1.0)]


def make_dora(folder):
    """Write an adapter that scales outputs, beside adding to them."""
    import numpy as np

    make_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        magnitude = name.replace("lora_A.weight", "lora_magnitude_vector")
        tensors[magnitude] = np.full(64, 2.0, dtype=np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return folder


def test_the_first_adapters_defaults_hold(server, ids):
    parsed = AdapterDefaults.model_validate({"generation": {"max_tokens": 7}, "max_context": 50})
    server.catalog.change("sql", {"defaults": parsed})
    complete(server, adapters=mixture(("sql", 1), ("pirate", 1)))
    assert server.engine.submitted[-1].sampling.max_tokens == 7
    complete(server, adapters=mixture(("pirate", 1), ("sql", 1)))
    assert server.engine.submitted[-1].sampling.max_tokens == 16


def test_the_clients_can_ask_for_both(server, client, ids):
    wish = mixture(("pirate", 0.5), ("sql", 0.25))
    with Client(base_url=server.url) as own:
        own.completions.create(model=BASE, prompt="hello", adapters=wish)
        assert told(server) == [(ids["pirate"], 0.5), (ids["sql"], 0.25)]
        own.completions.create(model="pirate", prompt="hello", adapter_scale=0.5)
        assert told(server) == [(ids["pirate"], 0.5)]
    client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "hello"}],
        extra_body={"adapters": wish},
        max_tokens=3,
    )
    assert told(server) == [(ids["pirate"], 0.5), (ids["sql"], 0.25)]
