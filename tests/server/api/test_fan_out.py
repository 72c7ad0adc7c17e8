from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest

from loraplex_scheduler.plan import EndEvent, FinishReason
from tests.server.api.conftest import BASE, make_adapter, running_server, wait_until

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def sql(server, tmp_path) -> str:
    """The name of another registered adapter."""
    answer = server.upload("sql", make_adapter(tmp_path / "sql", seed=1))
    assert answer.status_code == 201, answer.text
    return "sql"


def ask(server, **fields):
    return server.post("/v1/completions", {"prompt": "hello world", **fields})


def test_every_model_answers_in_its_place(server, adapter, sql):
    body = ask(server, models=[BASE, adapter, sql], prompt=["hello", "or"], n=2).json()
    names = [BASE] * 4 + [adapter] * 4 + [sql] * 4
    assert [choice["model"] for choice in body["choices"]] == names
    assert [choice["index"] for choice in body["choices"]] == [*range(12)]
    assert [choice["text"] for choice in body["choices"]] == ["hello", "hello", "or", "or"] * 3
    assert body["model"] == f"{BASE},{adapter},{sql}"
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 24
    ran = [request.adapter is not None for request in server.engine.submitted]
    assert ran == [False] * 4 + [True] * 8
    assert len({request.request_id for request in server.engine.submitted}) == 12


def test_a_streams_chunks_say_whose_they_are(server, client, adapter):
    stream = client.completions.create(
        model=openai.omit,
        prompt="hello world",
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"models": [adapter, BASE]},
    )
    texts, last = {}, None
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            key = (choice.index, choice.model)
            texts[key] = texts.get(key, "") + choice.text
            assert chunk.model == choice.model
    assert texts == {(0, adapter): "hello world", (1, BASE): "hello world"}
    assert (last.usage.prompt_tokens, last.model) == (4, f"{adapter},{BASE}")


def test_a_conversation_is_written_with_each_models_own_defaults(server, adapter):
    answer = httpx.patch(
        f"{server.url}/v1/adapters/{adapter}",
        json={
            "defaults": {
                "system_prompt": "Arr.",
                "chat_template": "{{ messages[0].content }}{{ messages[1].content }}",
                "generation": {"temperature": 0.25, "max_tokens": 3},
            }
        },
    )
    assert answer.status_code == 200, answer.text
    body = server.post(
        "/v1/chat/completions", {"models": [BASE, adapter], "messages": HELLO}
    ).json()
    decode = server.vocabulary.decoder(skip_special_tokens=False)
    base, own = server.engine.submitted
    assert decode(base.prompt_token_ids).startswith("<|start|>user\nhello")
    assert decode(own.prompt_token_ids) == "Arr.hello"
    assert (base.sampling.temperature, own.sampling.temperature) == (1.0, 0.25)
    assert own.sampling.max_tokens == 3
    assert [choice["model"] for choice in body["choices"]] == [BASE, adapter]
    assert [choice["message"]["role"] for choice in body["choices"]] == ["assistant"] * 2


def test_the_best_samples_are_chosen_of_each_model(server, adapter):
    body = ask(server, models=[BASE, adapter], best_of=3, n=2).json()
    assert [choice["model"] for choice in body["choices"]] == [BASE, BASE, adapter, adapter]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]


def test_one_unknown_model_fails_all_by_name(server, adapter):
    answer = ask(server, models=[adapter, "nobody"])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404, "models[1]")
    assert "nobody" in error["message"]
    adapter_id = server.catalog.get(adapter).id
    wait_until(lambda: server.catalog.num_leases(adapter_id) == 0)
    assert server.engine.submitted == []


def test_a_prompt_too_long_for_one_model_says_for_which(server, adapter):
    defaults = {"max_context": 2}
    httpx.patch(f"{server.url}/v1/adapters/{adapter}", json={"defaults": defaults})
    answer = ask(server, models=[BASE, adapter])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith(f"`{adapter}`: ")
    assert server.engine.submitted == []


def test_one_that_is_rejected_ends_the_others_and_is_named(server, adapter):
    server.engine.step_s = 0.01
    server.engine.end_with = EndEvent("", FinishReason.REJECTED, "too much", retry_after_s=2.0)
    server.engine.is_ending = lambda request: request.adapter is not None
    answer = ask(server, models=[BASE, adapter], max_tokens=200, ignore_eos=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["message"] == f"`{adapter}`: too much"
    wait_until(lambda: server.engine.num_running == 0)
    assert FinishReason.CANCELLED in server.engine.ended.values()


def test_leaving_cancels_every_model(server, adapter):
    server.engine.gate = threading.Event()
    body = {"models": [BASE, adapter], "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}) as answer:
        next(answer.iter_raw())
    wait_until(lambda: server.engine.num_running == 0)
    assert [*server.engine.ended.values()] == [FinishReason.CANCELLED] * 2


def test_all_are_admitted_or_none(tmp_path, vocabulary):
    with running_server(tmp_path / "data", vocabulary, tenant_tokens_per_minute=40) as server:
        assert server.upload("one", make_adapter(tmp_path / "one")).is_success
        answer = ask(server, models=[BASE, "one"], max_tokens=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
        assert server.engine.submitted == []
        # What the first of them was charged is there again.
        assert ask(server, models=[BASE, "one"], max_tokens=15).is_success


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"models": []}, "models"),
        ({"models": ["a", "a"]}, "models"),
        ({"models": ["a"], "model": BASE}, "models"),
        ({"models": ["a"], "adapter_scale": 2.0}, "models"),
        ({"models": ["x"] * 17}, "models"),
        ({"models": [""]}, "models[0]"),
    ],
)
def test_a_bad_list_is_refused_by_name(server, fields, param):
    answer = ask(server, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_the_async_client_reads_it_as_any_answer(server, adapter):
    async def ask_both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            answer = await client.chat.completions.create(
                model=openai.omit, messages=HELLO, extra_body={"models": [BASE, adapter]}
            )
            return [choice.model for choice in answer.choices]

    assert asyncio.run(ask_both()) == [BASE, adapter]


def test_events_of_all_models_are_whole_json(server, adapter):
    text = ask(server, models=[BASE, adapter], stream=True, echo=True, logprobs=1).text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    indexes = {json.loads(e[6:])["choices"][0]["index"] for e in events[:-2]}
    assert indexes == {0, 1}
