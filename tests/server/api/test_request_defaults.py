"""What an adapter's requests get where they do not say otherwise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from loraplex_server.adapters.defaults import AdapterDefaults
from loraplex_server.api import job_maker
from tests.server.api.conftest import BASE
from tests.support.fake_engine import INFO

TURN = [{"role": "user", "content": "hello"}]


@pytest.fixture
def with_defaults(server, adapter):
    """Give the adapter defaults; returns a function that asks and returns the engine's request."""

    def give(**defaults):
        parsed = AdapterDefaults.model_validate(defaults)
        server.catalog.change(adapter, {"defaults": parsed})

        def ask(path: str = "/v1/completions", *, model: str = adapter, **fields):
            wish = {"prompt": "hello"} if path == "/v1/completions" else {"messages": TURN}
            answer = server.post(path, {"model": model, **wish, **fields})
            assert answer.status_code == 200, answer.text
            return server.engine.submitted[-1]

        return ask

    return give


def prompt_of(server, request) -> str:
    return server.vocabulary.decoder(skip_special_tokens=False)(request.prompt_token_ids)


GENERATION = {
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.125,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "seed": 11,
    "max_tokens": 9,
    "min_tokens": 2,
    "stop_token_ids": [4, 5],
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fields_that_a_request_leaves_out_are_the_adapters(with_defaults, path):
    ask = with_defaults(generation=GENERATION)
    sampling = ask(path).sampling
    assert {name: getattr(sampling, name) for name in GENERATION} == {
        **GENERATION,
        "stop_token_ids": frozenset({4, 5}),
    }


def test_the_base_model_knows_nothing_of_them(with_defaults):
    ask = with_defaults(generation=GENERATION)
    sampling = ask(model=BASE).sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.min_tokens) == (1.0, 16, 0)


def test_what_a_request_says_holds_and_null_means_the_servers(with_defaults):
    ask = with_defaults(generation=GENERATION)
    sampling = ask(temperature=0.75, top_k=3, stop_token_ids=[], max_tokens=None).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.75, 3, 0.5)
    assert sampling.stop_token_ids == frozenset()
    assert sampling.max_tokens == 16
    assert ask(temperature=None).sampling.temperature == 1.0
    chat = "/v1/chat/completions"
    assert ask(chat, max_completion_tokens=20).sampling.max_tokens == 20
    unbounded = ask(chat, max_completion_tokens=None)
    assert unbounded.sampling.max_tokens == INFO.max_model_len - len(unbounded.prompt_token_ids)


def test_default_lengths_give_way_to_what_fits(with_defaults):
    ask = with_defaults(generation={"max_tokens": 10_000, "min_tokens": 50})
    request = ask(prompt="x" * 200)
    assert request.sampling.max_tokens == INFO.max_model_len - 200
    assert ask(max_tokens=8).sampling.min_tokens == 8


def test_default_stop_strings_end_the_text(server, with_defaults, adapter):
    with_defaults(generation={"stop": ["lo w"]})
    body = {"model": adapter, "prompt": "hello world"}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("hel", "lo w")
    for stop in ("ld", None, []):
        choice = server.post("/v1/completions", {**body, "stop": stop}).json()["choices"][0]
        assert choice["stop_reason"] == (stop or None)


def test_the_system_prompt_is_for_conversations_without_one(server, with_defaults):
    ask = with_defaults(system_prompt="Talk like a pirate.")
    chat = "/v1/chat/completions"
    given = "<|start|>system\nTalk like a pirate.<|end|>\n<|start|>user\nhello<|end|>\n"
    assert prompt_of(server, ask(chat)).startswith(given)
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be brief."}, *TURN]
        assert prompt_of(server, ask(chat, messages=own)).startswith(
            "<|start|>system\nBe brief.<|end|>\n<|start|>user\nhello"
        )
    assert "pirate" not in prompt_of(server, ask(chat, model=BASE))
    assert prompt_of(server, ask()) == "hello"


def test_the_adapters_chat_template_replaces_the_models(server, with_defaults):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{{ tail or '>' }}"
    ask = with_defaults(chat_template=template, system_prompt="Aye.")
    chat = "/v1/chat/completions"
    assert prompt_of(server, ask(chat)) == "[system] Aye. [user] hello >"
    assert prompt_of(server, ask(chat, chat_template_kwargs={"tail": "!"})).endswith("hello !")
    assert prompt_of(server, ask(chat, model=BASE)).startswith("<|start|>user")


def test_a_template_that_fails_is_told_to_the_request(server, with_defaults, adapter):
    with_defaults(chat_template="{{ raise_exception('odd turns') }}")
    answer = server.post("/v1/chat/completions", {"model": adapter, "messages": TURN})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "chat_template_failed")
    assert "odd turns" in error["message"]


def test_a_template_that_does_not_end_is_stopped_and_holds_nobody_up(
    server, with_defaults, adapter, monkeypatch
):
    monkeypatch.setattr(job_maker, "_TEMPLATE_S", 0.3)
    loop = "{% for a in r %}" * 3 + "{% endfor %}" * 3
    with_defaults(chat_template="{% set r = range(99999) %}" + loop)
    body = {"model": adapter, "messages": TURN}
    with ThreadPoolExecutor(8) as pool:
        stuck = [pool.submit(server.post, "/v1/chat/completions", body) for _ in range(8)]
        others = server.post("/v1/completions", {"model": adapter, "prompt": "hello"})
        assert others.status_code == 200
        assert not all(answer.done() for answer in stuck)
        for answer in [one.result(20) for one in stuck]:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "chat_template_failed")
            assert "longer than 0.3 s" in error["message"]


@pytest.mark.parametrize("template", ["{{ 9 ** 9 ** 9 }}", "{% for x in %}"])
def test_a_template_that_cannot_be_run_is_refused_when_it_is_set(server, adapter, template):
    path = f"{server.url}/v1/adapters/{adapter}"
    answer = httpx.patch(path, json={"defaults": {"chat_template": template}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "defaults.chat_template"


def test_the_adapters_context_bounds_prompt_and_answer(server, with_defaults, adapter):
    ask = with_defaults(max_context=20)
    assert ask(max_tokens=19).sampling.max_tokens == 19
    assert ask("/v1/chat/completions", messages=[{"role": "user", "content": ""}])
    for fields, numbers in (({"max_tokens": 20}, ("20", "21")), ({"prompt": "x" * 20}, ("20",))):
        body = {"model": adapter, "prompt": "hello", **fields}
        answer = server.post("/v1/completions", body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["message"].startswith("This adapter's maximum context length is 20 tokens")
        assert all(number in error["message"] for number in numbers)
    assert ask(model=BASE, prompt="x" * 30)


def test_a_context_beyond_the_models_changes_nothing(server, with_defaults, adapter):
    with_defaults(max_context=10_000)
    answer = server.post("/v1/completions", {"model": adapter, "prompt": "x" * 300})
    assert answer.json()["error"]["message"].startswith(
        "This model's maximum context length is 256"
    )
