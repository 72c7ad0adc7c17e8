from __future__ import annotations

import json

import openai
import pytest

from tests.server.api.conftest import BASE


def test_a_string_is_continued(client):
    answer = client.completions.create(model=BASE, prompt="hello world")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("hello world", "stop")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == BASE
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_every_form_of_prompt_is_accepted(client, vocabulary):
    ids, other = vocabulary.encode("hello"), vocabulary.encode("or ld")
    for prompt, texts in (
        (["hello", "or ld"], ["hello", "or ld"]),
        (ids, ["hello"]),
        ([ids, other], ["hello", "or ld"]),
    ):
        answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=20)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == [*range(len(texts))]


def test_samples_of_each_prompt_come_in_order_with_seeds_of_their_own(server, client):
    answer = client.completions.create(
        model=BASE, prompt=["hello", "world"], n=3, seed=7, temperature=0.5
    )
    assert [choice.text for choice in answer.choices] == ["hello"] * 3 + ["world"] * 3
    seeds = [request.sampling.seed for request in server.engine.submitted]
    assert seeds[0] == 7
    assert len(set(seeds)) == 6
    assert answer.usage.prompt_tokens == 1 + len(server.vocabulary.encode("world"))
    client.completions.create(model=BASE, prompt=["hello", "world"], n=3, seed=7)
    assert [request.sampling.seed for request in server.engine.submitted[6:]] == seeds


def test_a_seed_is_drawn_when_none_is_given(server, client):
    for _ in range(2):
        client.completions.create(model=BASE, prompt="hello")
    first, second = (request.sampling.seed for request in server.engine.submitted)
    assert first != second


def test_the_default_is_sixteen_tokens(client):
    answer = client.completions.create(model=BASE, prompt="abcdefghijklmnopqrstuvwxyz")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_a_stream_carries_the_same_text_then_usage(client):
    stream = client.completions.create(
        model=BASE,
        prompt=["hello world", "or"],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=30,
    )
    texts, reasons, last = ["", ""], {}, None
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == ["hello world", "or"]
    assert reasons == {0: "stop", 1: "stop"}
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_a_stop_string_is_found_over_token_boundaries(server, client):
    answer = client.completions.create(model=BASE, prompt="hello world", stop=["lo w"])
    assert answer.choices[0].text == "hel"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "lo w"
    kept = client.completions.create(
        model=BASE,
        prompt="hello world",
        stop="o w",
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == "hello w"


def test_a_stop_string_cancels_what_the_engine_still_computes(server, client):
    server.engine.step_s = 0.01
    answer = client.completions.create(
        model=BASE, prompt="abcdefgh", stop="c", max_tokens=200, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == "ab"
    assert answer.usage.completion_tokens == 3
    assert server.engine.submitted[0].request_id in server.engine.cancelled


def test_echo_puts_the_prompt_first(client, vocabulary):
    for prompt in ("hello", vocabulary.encode("hello")):
        answer = client.completions.create(model=BASE, prompt=prompt, echo=True, n=2)
        assert [choice.text for choice in answer.choices] == ["hellohello"] * 2
        stream = client.completions.create(model=BASE, prompt=prompt, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "hellohello"


def test_logprobs_name_tokens_and_their_places(client):
    for stream in (False, True):
        answer = client.completions.create(
            model=BASE, prompt="hello é", logprobs=2, max_tokens=4, stream=stream
        )
        parts = [chunk.choices[0].logprobs for chunk in answer] if stream else None
        parts = [part for part in parts if part] if parts else [answer.choices[0].logprobs]
        tokens = [token for part in parts for token in part.tokens]
        assert tokens == ["hello", " ", "bytes:\\xc3", "bytes:\\xa9"]
        assert [o for part in parts for o in part.text_offset] == [0, 5, 6, 7]
        assert parts[0].token_logprobs[0] == -0.5
        assert min(parts[0].top_logprobs[0].values()) == -9999.0


def test_sampling_reaches_the_engine(server, client):
    client.completions.create(
        model=BASE,
        prompt="hello",
        max_tokens=5,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 10},
        extra_body={
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "stop_token_ids": [9],
            "min_tokens": 2,
            "ignore_eos": True,
        },
    )
    sampling = server.engine.submitted[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.25, 0.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert dict(sampling.logit_bias) == {5: 10}
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.5)
    assert sampling.stop_token_ids == {9}
    assert (sampling.min_tokens, sampling.ignore_eos) == (2, True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias[1]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_tokens": 99}, "min_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 2}, "prompt_logprobs"),
        ({"best_of": 3, "n": 4}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"temprature": 1}, "temprature"),
        ({"model": ""}, "model"),
        ({"prompt": "\ud800"}, None),
        ({"model": "\ud800"}, "model"),
    ],
)
def test_a_bad_field_is_refused_by_name(server, fields, param):
    body = {"model": BASE, "prompt": "hello", **fields}
    headers = {"content-type": "application/json"}
    with server.http() as http:
        answer = http.post("/v1/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert server.engine.submitted == []


def test_values_that_ask_for_nothing_are_accepted(client):
    answer = client.completions.create(
        model=BASE,
        prompt="hello",
        best_of=1,
        suffix=None,
        user="somebody",
        extra_body={"response_format": {"type": "text"}, "use_beam_search": False, "store": None},
    )
    assert answer.choices[0].text == "hello"


def test_a_prompt_too_long_says_the_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
    assert "256" in caught.value.message
    assert "300" in caught.value.message
    with pytest.raises(openai.BadRequestError, match="10 in the prompt and 250"):
        client.completions.create(model=BASE, prompt="x" * 10, max_tokens=250)
