from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
import threading

import numpy as np
import openai
import pytest

from loraplex_scheduler.plan import FinishReason, Pooling
from tests.server.api.conftest import BASE, running_server, wait_until
from tests.support.fake_engine import embedding_of


def embed(server, **fields):
    return server.post("/v1/embeddings", {"model": BASE, "input": "hello world", **fields})


def unit(vector):
    length = math.hypot(*vector)
    return pytest.approx([number / length for number in vector], rel=1e-6)


def test_the_openai_client_gets_unit_vectors_in_order(server, client):
    answer = client.embeddings.create(model=BASE, input=["hello world", "or"])
    texts = [server.vocabulary.encode(text) for text in ("hello world", "or")]
    assert [item.index for item in answer.data] == [0, 1]
    for item, token_ids in zip(answer.data, texts, strict=True):
        assert item.embedding == unit(embedding_of(token_ids, Pooling.LAST))
    assert answer.model == BASE
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 3


def test_every_form_of_input_and_of_numbers_is_the_same(server, client):
    ids = server.vocabulary.encode("hello world")
    expected = unit(embedding_of(ids, Pooling.LAST))
    for given in ("hello world", ["hello world"], ids, [ids]):
        for form in ("float", "base64"):
            answer = client.embeddings.create(model=BASE, input=given, encoding_format=form)
            got = answer.data[0].embedding
            if form == "base64":
                assert isinstance(got, str)
                got = np.frombuffer(base64.b64decode(got), "<f4").tolist()
            assert got == expected


def test_an_adapter_embeds_as_well(server, adapter):
    assert embed(server, model=adapter).json()["model"] == adapter
    [request] = server.engine.submitted
    assert (request.adapter is not None, request.pooling) == (True, Pooling.LAST)
    adapter_id = server.catalog.get(adapter).id
    wait_until(lambda: server.catalog.num_leases(adapter_id) == 0)


def test_mean_pooling_and_raw_numbers_can_be_asked_for(server):
    body = embed(server, pooling="mean", normalize=False).json()
    ids = server.vocabulary.encode("hello world")
    assert body["data"][0]["embedding"] == pytest.approx(list(embedding_of(ids, Pooling.MEAN)))
    assert server.engine.submitted[0].pooling is Pooling.MEAN
    assert body["metrics"]["queue_time_ms"] == 250.0


def test_fewer_dimensions_are_the_first_ones_with_length_one_again(server):
    vector = embed(server, dimensions=2).json()["data"][0]["embedding"]
    assert vector == unit([1.0, 2.0])


def test_a_long_input_can_be_cut(server):
    assert embed(server, input="x" * 999).json()["error"]["param"] == "input"
    assert embed(server, input="x" * 999, truncate_prompt_tokens=5).is_success
    assert len(server.engine.submitted[0].prompt_token_ids) == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [99999]}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 5}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"temperature": 1}, "temperature"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_a_bad_field_is_refused_by_name(server, fields, param):
    answer = embed(server, **fields)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param, answer.text


def test_leaving_cancels(server):
    server.engine.gate, server.engine.hold_after = threading.Event(), 0
    raw = json.dumps({"model": BASE, "input": ["hello"] * 3}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(raw), raw)
        )
        wait_until(lambda: len(server.engine.submitted) == 3)
    wait_until(lambda: server.engine.num_running == 0)
    assert [*server.engine.ended.values()] == [FinishReason.CANCELLED] * 3


def test_only_inputs_are_charged(tmp_path, vocabulary):
    with running_server(tmp_path / "data", vocabulary, tenant_tokens_per_minute=4) as server:
        assert embed(server).is_success
        scored = {"model": BASE, "prompt": "hello world", "echo": True, "max_tokens": 0}
        assert server.post("/v1/completions", scored).is_success
        refused = embed(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")


def test_many_inputs_and_the_async_client(server):
    async def run() -> int:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            answer = await client.embeddings.create(model=BASE, input=["hello"] * 40)
            return len(answer.data)

    assert asyncio.run(run()) == 40
