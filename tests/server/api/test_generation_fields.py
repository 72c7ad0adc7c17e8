"""Fields beside OpenAI's usual ones: what reaches the engine, and what comes back."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.server.api.conftest import BASE


def complete(server, **fields) -> dict:
    answer = server.post("/v1/completions", {"model": BASE, "prompt": "hello world", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(server, **fields) -> list[dict]:
    body = {"model": BASE, "prompt": "hello world", "stream": True, **fields}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


# ---- the best of several samples ---------------------------------------------------------------


def test_the_best_samples_are_those_with_the_likeliest_tokens(server, client):
    likely = {"-0": -2.0, "-1": -0.5, "-2": -1.0}
    texts = {"-0": "he", "-1": "or", "-2": "ld"}
    server.engine.logprob_of = lambda request, token_id: likely[request.request_id[-2:]]
    server.engine.reply = lambda request: server.vocabulary.encode(texts[request.request_id[-2:]])
    answer = client.completions.create(model=BASE, prompt="hello", best_of=3, n=2)
    assert [choice.text for choice in answer.choices] == ["or", "ld"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.logprobs for choice in answer.choices] == [None, None]
    assert answer.usage.completion_tokens == 6  # all that were drawn


def test_each_prompt_has_its_own_best(server):
    likely = {"-0": -2.0, "-1": -0.5, "-2": -0.5, "-3": -2.0}
    server.engine.logprob_of = lambda request, token_id: likely[request.request_id[-2:]]
    body = complete(server, prompt=["hello", "world"], best_of=2, logprobs=0)
    assert [choice["text"] for choice in body["choices"]] == ["hello", "world"]
    assert [c["logprobs"]["token_logprobs"][0] for c in body["choices"]] == [-0.5, -0.5]


# ---- the prompt's own tokens -------------------------------------------------------------------


def test_echo_with_logprobs_begins_with_the_prompts_and_knows_nothing_of_the_first(server):
    [choice] = complete(server, echo=True, logprobs=1, max_tokens=1)["choices"]
    assert choice["text"] == "hello worldhello"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["hello", " world", "hello"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {" world": -0.5}, {"hello": -0.5}]
    assert logprobs["text_offset"] == [0, 5, 11]


def test_a_harness_that_wants_no_tokens_gets_the_prompt_alone(server):
    prompt = server.vocabulary.encode("hello world")
    body = complete(server, prompt=[prompt, prompt[:1]], echo=True, logprobs=1, max_tokens=0)
    assert [choice["text"] for choice in body["choices"]] == ["hello world", "hello"]
    assert [c["logprobs"]["token_logprobs"] for c in body["choices"]] == [[None, -0.5], [None]]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert body["usage"]["completion_tokens"] == 0
    assert server.engine.submitted[0].sampling.prompt_logprobs == 1


def test_no_tokens_are_refused_without_an_echo(server):
    answer = server.post("/v1/completions", {"model": BASE, "prompt": "hello", "max_tokens": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_a_stream_echoes_logprobs_as_a_whole_answer_does(server):
    whole = complete(server, prompt=["hello world", "or"], echo=True, logprobs=1, n=2)
    texts, tokens, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
    for chunk in chunks(server, prompt=["hello world", "or"], echo=True, logprobs=1, n=2):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
        offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole["choices"]]
    assert offsets == [choice["logprobs"]["text_offset"] for choice in whole["choices"]]


def test_a_stream_of_no_tokens_is_the_prompt(server):
    streamed = chunks(server, echo=True, logprobs=0, max_tokens=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "hello world"
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_prompt_logprobs_are_by_token_id_as_in_vllm(server):
    [choice] = complete(server, prompt_logprobs=2)["choices"]
    second = server.vocabulary.encode("hello world")[1]
    nothing, entry = choice["prompt_logprobs"]
    assert nothing is None
    assert entry[str(second)] == {"logprob": -0.5, "rank": 1, "decoded_token": " world"}
    assert [rival["rank"] for rival in entry.values()] == [1, 2]


def test_prompt_logprobs_are_refused_in_a_stream(server):
    body = {"model": BASE, "prompt": "hello", "prompt_logprobs": 1, "stream": True}
    answer = server.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


# ---- token ids ---------------------------------------------------------------------------------


def test_token_ids_come_whole_and_in_a_streams_chunks(server):
    prompt = server.vocabulary.encode("hello world")
    [choice] = complete(server, return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == prompt
    assert choice["token_ids"] == [*prompt, 0]
    streamed = [chunk["choices"][0] for chunk in chunks(server, return_token_ids=True)]
    assert streamed[0]["prompt_token_ids"] == prompt
    assert all("prompt_token_ids" not in later for later in streamed[1:])
    assert [token for part in streamed for token in part["token_ids"]] == [*prompt, 0]


def test_tokens_can_be_shown_by_their_ids(server):
    [choice] = complete(server, logprobs=1, return_tokens_as_token_ids=True)["choices"]
    first, second = server.vocabulary.encode("hello world")
    names = [f"token_id:{first}", f"token_id:{second}", "token_id:0"]
    assert choice["logprobs"]["tokens"] == names
    assert [*choice["logprobs"]["top_logprobs"][0]] == names[:1]


# ---- what may be drawn -------------------------------------------------------------------------


def test_allowed_tokens_and_bad_words_reach_the_engine(server):
    complete(server, allowed_token_ids=[5, 6, 5], bad_words=["world", " world", "or"])
    sampling = server.engine.submitted[0].sampling
    assert sampling.allowed_token_ids == {5, 6}
    encode = server.vocabulary.encode
    spellings = {tuple(encode(text)) for text in ("world", " world", "or", " or")}
    assert set(sampling.bad_words) == spellings
    assert len(sampling.bad_words) == len(spellings)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [99999]}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words[0]"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"request_id": "a b"}, "request_id"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"stream": True, "stream_options": {"interval": 1}}, "stream_options.interval"),
    ],
)
def test_a_bad_field_is_refused_by_name(server, fields, param):
    answer = server.post("/v1/completions", {"model": BASE, "prompt": "hello", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert server.engine.submitted == []


# ---- long prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 1}, " world"),
        ({"truncate_prompt_tokens": 1, "truncation_side": "right"}, "hello"),
        ({"truncate_prompt_tokens": 9}, "hello world"),
    ],
)
def test_a_prompt_is_cut_from_the_side_that_is_wished(server, fields, kept):
    [choice] = complete(server, echo=True, **fields)["choices"]
    assert choice["text"] == kept + kept


def test_a_prompt_can_be_cut_to_what_fits(server):
    complete(server, prompt="x" * 999, truncate_prompt_tokens=-1, max_tokens=56)
    assert len(server.engine.submitted[0].prompt_token_ids) == 200
    complete(server, prompt=[7] * 999, truncate_prompt_tokens=-1)
    assert len(server.engine.submitted[1].prompt_token_ids) == 255


# ---- usage, times, ids -------------------------------------------------------------------------


def test_each_chunk_can_carry_its_choices_usage_so_far(server):
    options = {"continuous_usage_stats": True, "include_usage": True, "include_obfuscation": True}
    *parts, last = chunks(server, prompt=["hello world", "or"], stream_options=options)
    by_choice: dict[int, list[int]] = {0: [], 1: []}
    for part in parts:
        usage = part["usage"]
        by_choice[part["choices"][0]["index"]].append(usage["completion_tokens"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert by_choice == {0: [1, 2, 3], 1: [1, 2]}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    alone = chunks(server, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in alone] == [1, 2, 3]


def test_running_usage_counts_tokens_whose_text_is_held_back(server):
    options = {"continuous_usage_stats": True}
    streamed = chunks(server, prompt="é", stream_options=options)  # two tokens, one character
    assert [chunk["usage"]["completion_tokens"] for chunk in streamed] == [2, 3]


def test_the_times_of_an_answer_are_in_its_body_and_its_headers(server):
    answer = server.post("/v1/completions", {"model": BASE, "prompt": "hello world"})
    metrics = answer.json()["metrics"]
    assert (metrics["queue_time_ms"], metrics["adapter_load_ms"]) == (250.0, 500.0)
    assert metrics["prefill_ms"] == 125.0
    assert metrics["generation_time_ms"] == metrics["decode_ms"] >= 0
    assert metrics["total_time_ms"] >= metrics["time_to_first_token_ms"] >= 0
    assert metrics["mean_itl_ms"] >= 0
    assert metrics["tokens_per_second"] <= 3 / 0.125
    headers = answer.headers
    assert (headers["x-queue-time-ms"], headers["x-adapter-load-ms"]) == ("250", "500")
    assert headers["x-prefill-ms"] == "125"
    assert {"x-decode-ms", "x-time-to-first-token-ms", "x-total-time-ms"} <= set(headers)


def test_one_token_has_no_time_between_tokens(server):
    assert complete(server, max_tokens=1)["metrics"]["mean_itl_ms"] is None


def test_a_streams_headers_have_what_its_first_token_knows(server):
    body = {"model": BASE, "prompt": "hello world", "stream": True}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as answer:
        assert answer.headers["x-queue-time-ms"] == "250"
        assert "x-time-to-first-token-ms" in answer.headers
        assert "x-decode-ms" not in answer.headers
        events = [
            json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")
        ]
    assert events[-1]["metrics"]["prefill_ms"] == 125.0


def test_an_answers_id_has_the_clients_own_word(server):
    first, second = (complete(server, request_id="mine") for _ in range(2))
    assert first["id"] == second["id"] == "cmpl-mine"
    ids = [request.request_id for request in server.engine.submitted]
    assert len(set(ids)) == 2
