"""LoRAX's native endpoints, as its client calls them and reads them."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.server.api.conftest import BASE, wait_until

#: What LoRAX's Python client sends when it is given nothing but an adapter.
CLIENT_DEFAULTS = {
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "best_of": None,
    "decoder_input_details": False,
    "details": True,
    "do_sample": False,
    "ignore_eos_token": False,
    "max_new_tokens": None,
    "repetition_penalty": None,
    "response_format": None,
    "return_full_text": False,
    "return_k_alternatives": None,
    "seed": None,
    "stop": [],
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "watermark": False,
}


def generate(server, path: str = "/generate", **parameters) -> httpx.Response:
    return server.post(path, {"inputs": "hello world", "parameters": parameters})


def events(answer: httpx.Response) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data:") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_a_plain_answer_is_text_and_nothing_else(server):
    answer = server.post("/generate", {"inputs": "hello world"})
    assert (answer.status_code, answer.json()) == (200, {"generated_text": "hello world"})
    assert server.engine.submitted[0].adapter is None
    assert server.engine.submitted[0].sampling.is_greedy


def test_the_clients_request_gets_every_detail(server, adapter):
    answer = generate(server, **CLIENT_DEFAULTS, adapter_id=adapter)
    body = answer.json()
    tokens = body["details"].pop("tokens")
    assert body == {
        "generated_text": "hello world",
        "details": {
            "finish_reason": "eos_token",
            "prompt_tokens": 2,
            "generated_tokens": 3,
            "seed": None,
            "prefill": [],
        },
    }
    assert [token["text"] for token in tokens] == ["hello", " world", "<|end|>"]
    assert [token["special"] for token in tokens] == [False, False, True]
    assert all(set(token) == {"id", "text", "logprob", "special"} for token in tokens)
    assert server.engine.submitted[0].adapter is not None


def test_a_stream_has_an_event_for_each_token_and_no_end_mark(server, adapter):
    shown = events(generate(server, "/generate_stream", adapter_id=adapter, max_new_tokens=2))
    assert "".join(event["token"]["text"] for event in shown) == "hello world"
    assert [event["generated_text"] for event in shown] == [None, "hello world"]
    assert shown[0]["details"] is None
    assert shown[1]["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 2,
        "generated_tokens": 2,
        "seed": None,
    }


@pytest.mark.parametrize(
    ("parameters", "is_greedy"),
    [
        ({}, True),
        ({"do_sample": True}, False),
        ({"temperature": 0.5}, False),
        ({"temperature": 1.0}, True),
        ({"top_k": 5}, False),
        ({"top_p": 0.5}, False),
        ({"seed": 3}, True),
    ],
)
def test_tokens_are_drawn_when_lorax_would_draw(server, parameters, is_greedy):
    assert generate(server, **parameters).status_code == 200
    assert server.engine.submitted[0].sampling.is_greedy is is_greedy


def test_parameters_mean_what_they_mean_there(server):
    answer = generate(
        server,
        do_sample=True,
        temperature=0.5,
        top_k=5,
        top_p=0.75,
        repetition_penalty=1.25,
        seed=3,
        stop=["lo w"],
        max_new_tokens=9,
        ignore_eos_token=True,
        details=True,
    )
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 5, 0.75)
    assert (sampling.repetition_penalty, sampling.seed, sampling.max_tokens) == (1.25, 3, 9)
    assert sampling.ignore_eos
    body = answer.json()
    assert body["generated_text"] == "hello w"  # with the stop string, as there
    assert body["details"]["finish_reason"] == "stop_sequence"
    assert body["details"]["seed"] == 3


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1]}}, "merged_adapters"),
        ({"api_token": "secret"}, "api_token"),
        ({"best_of": 2}, "best_of"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"return_k_alternatives": 2}, "return_k_alternatives"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"schema": {}, "response_format": {"type": "json_object"}}, "schema"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"truncate": 0}, "truncate"),
        ({"color": "red"}, "color"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, parameters, name):
    answer = generate(server, **parameters)
    body = answer.json()
    assert answer.status_code == 422
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == "validation"
    assert name in body["error"]
    assert server.engine.submitted == []


def test_an_adapter_that_nobody_has_is_not_found(server):
    for path in ("/generate", "/generate_stream"):
        answer = generate(server, path, adapter_id="nobody")
        assert answer.status_code == 404
        assert "nobody" in answer.json()["error"]
    assert generate(server, adapter_id=BASE).status_code == 200


def test_a_failure_has_loraxs_shape(server):
    from loraplex_scheduler.plan import EndEvent, FinishReason

    server.engine.end_with = EndEvent("", FinishReason.REJECTED, "too much", retry_after_s=2.0)
    answer = generate(server)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json() == {"error": "too much", "error_type": "overloaded"}
    server.engine.end_with = EndEvent("", FinishReason.FAILED, "it broke")
    server.engine.end_after = 1
    shown = events(generate(server, "/generate_stream"))
    assert shown[-1] == {"error": "it broke", "error_type": "generation"}
    wait_until(lambda: server.engine.num_running == 0)


def test_the_best_of_several_samples_comes_first(server):
    likely = {"-0": -2.0, "-1": -0.5, "-2": -1.0}
    server.engine.logprob_of = lambda request, token_id: likely[request.request_id[-2:]]
    body = generate(server, best_of=3, do_sample=True, seed=7, details=True).json()
    details = body["details"]
    others = details["best_of_sequences"]
    logprobs = [part["tokens"][0]["logprob"] for part in (details, *others)]
    assert logprobs == [-0.5, -1.0, -2.0]
    assert [other["generated_text"] for other in others] == ["hello world"] * 2
    seeds = [request.sampling.seed for request in server.engine.submitted]
    assert [part["seed"] for part in (details, *others)] == [seeds[1], seeds[2], seeds[0]]


def test_the_prompt_and_the_rivals_of_each_token_are_shown_when_asked_for(server):
    answer = generate(
        server, details=True, decoder_input_details=True, return_k_alternatives=2, max_new_tokens=1
    )
    details = answer.json()["details"]
    assert [token["text"] for token in details["prefill"]] == ["hello", " world"]
    assert [token["logprob"] for token in details["prefill"]] == [None, -0.5]
    [token] = details["tokens"]
    rivals = token["alternative_tokens"]
    assert [rival["logprob"] for rival in rivals] == [-0.5, -9999.0]
    assert rivals[0]["id"] == token["id"]


def test_streams_show_rivals_and_refuse_what_only_whole_answers_have(server):
    shown = events(generate(server, "/generate_stream", return_k_alternatives=1))
    assert all(len(event["token"]["alternative_tokens"]) == 1 for event in shown)
    for name, value in (("return_full_text", True), ("decoder_input_details", True)):
        answer = generate(server, "/generate_stream", **{name: value})
        assert (answer.status_code, name in answer.json()["error"]) == (422, True)


def test_the_full_text_has_the_inputs_in_front(server):
    answer = generate(server, return_full_text=True)
    assert answer.json() == {"generated_text": "hello worldhello world"}


def test_a_long_prompt_is_cut_to_its_end(server):
    assert generate(server, truncate=1).json() == {"generated_text": " world"}


@pytest.mark.parametrize(
    "inputs", ["hello", json.dumps([{"role": "user", "content": "hello"}])], ids=["text", "list"]
)
def test_a_chat_template_wraps_what_a_user_says_or_a_conversation(server, inputs):
    parameters = {"apply_chat_template": True}
    assert server.post("/generate", {"inputs": inputs, "parameters": parameters}).is_success
    prompt = server.engine.submitted[0].prompt_token_ids
    written = server.vocabulary.decoder(skip_special_tokens=False)(prompt)
    assert written == "<|start|>user\nhello<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    "parameters",
    [
        {"schema": {"type": "object"}},
        {"schema": '{"type": "object"}'},
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_a_schema_reaches_the_engine_as_a_grammar(server, parameters):
    assert generate(server, **parameters).is_success
    grammar = server.engine.submitted[0].sampling.grammar
    assert "object" in grammar


def test_the_headers_are_those_that_its_clients_read(server, adapter):
    answer = generate(server, adapter_id=adapter)
    told = answer.headers
    assert (told["x-prompt-tokens"], told["x-generated-tokens"], told["x-total-tokens"]) == (
        "2",
        "3",
        "5",
    )
    assert (told["x-model-id"], told["x-adapter-id"]) == (BASE, adapter)
    assert told["x-compute-characters"] == "11"
    assert int(told["x-total-time"]) >= int(told["x-inference-time"]) >= 0
    assert int(told["x-queue-time"]) == 250
