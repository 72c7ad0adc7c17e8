from __future__ import annotations

import json

import httpx
import pytest

from tests.server.api.conftest import BASE

HELLO = [{"role": "user", "content": "hello"}]


def test_a_text_becomes_the_ids_that_requests_would_have(server):
    ids = server.vocabulary.encode("hello world")
    body = server.post("/tokenize", {"prompt": "hello world"}).json()
    assert body == {"count": 2, "max_model_len": 256, "tokens": ids, "token_strs": None}
    named = server.post(
        "/tokenize", {"model": BASE, "prompt": "hello é", "return_token_strs": True}
    )
    assert named.json()["token_strs"] == ["hello", " ", "bytes:\\xc3", "bytes:\\xa9"]


def test_tokens_become_their_text_again(server):
    ids = server.vocabulary.encode("<|start|>hello world<|end|>")
    body = server.post("/detokenize", {"model": BASE, "tokens": ids}).json()
    assert body == {"prompt": "<|start|>hello world<|end|>"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    many = server.post("/detokenize", {"tokens": ids * 2000})
    assert many.json()["prompt"] == "<|start|>hello world<|end|>" * 2000


def test_a_conversation_is_written_by_the_adapters_template(server, adapter):
    decode = server.vocabulary.decoder(skip_special_tokens=False)
    body = server.post("/tokenize", {"messages": HELLO}).json()
    assert decode(body["tokens"]) == "<|start|>user\nhello<|end|>\n<|start|>assistant\n"
    defaults = {"chat_template": "{{ messages[0].content }}!", "max_context": 99}
    httpx.patch(f"{server.url}/v1/adapters/{adapter}", json={"defaults": defaults})
    own = server.post("/tokenize", {"model": adapter, "messages": HELLO}).json()
    assert (decode(own["tokens"]), own["max_model_len"]) == ("hello!", 99)
    assert server.engine.submitted == []


def test_a_text_longer_than_any_request_is_counted(server):
    assert server.post("/tokenize", {"prompt": "x" * 10_000}).json()["count"] == 10_000
    assert server.post("/tokenize", {"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "a", "adapters": [{"name": "a"}]}, "adapters"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, "model"),
    ],
)
def test_a_bad_field_is_refused_by_name(server, path, body, param):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}{path}", content=json.dumps(body), headers=headers)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param, answer.text
