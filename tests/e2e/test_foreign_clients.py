"""A real server, asked by the clients and controllers of other servers."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from loraplex import Client
from tests.e2e.conftest import EXAMPLES

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
ASK = {"prompt": "The captain said:", "max_tokens": 6, "temperature": 0}


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(server.base_url + path, json=body, timeout=60)


def text(server, **fields) -> str:
    answer = post(server, "/v1/completions", **ASK, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def texts(server) -> dict[str, str]:
    """What the base and each adapter say."""
    said = {name: text(server, model=name) for name in (BASE, "pirate", "sql")}
    assert len(set(said.values())) == 3
    return said


def test_vllms_pair_brings_an_adapter_and_takes_it_away(server, texts):
    answer = post(server, "/v1/load_lora_adapter", lora_name="mate", lora_path="pirate")
    assert answer.text == "Success: LoRA adapter 'mate' added successfully."
    assert text(server, model="mate") == texts["pirate"]
    answer = post(server, "/v1/unload_lora_adapter", lora_name="mate")
    assert answer.text == "Success: LoRA adapter 'mate' removed successfully."


def test_every_way_to_name_an_adapter_gets_its_answer(server, texts):
    for fields in (
        {"model": f"{BASE}:pirate"},
        {"model": BASE, "lora_path": "pirate"},
        {"model": "", "adapter_id": "pirate"},
        {"adapters": [{"name": "pirate"}]},
        {"model": "pirate", "adapter_scale": 1.0},
    ):
        assert text(server, **fields) == texts["pirate"], fields


def test_scales_and_mixtures_are_what_they_say(server, texts):
    assert text(server, model="pirate", adapter_scale=0) == texts[BASE]
    only_sql = [{"name": "pirate", "weight": 0}, {"name": "sql", "weight": 1}]
    assert text(server, adapters=only_sql) == texts["sql"]
    mixed = [{"name": "pirate", "weight": 0.6}, {"name": "sql", "weight": 0.6}]
    assert text(server, adapters=mixed) == text(server, adapters=mixed[::-1])


def test_loraxs_answer_is_the_same_whole_or_streamed(server, texts):
    parameters = {"adapter_id": "pirate", "max_new_tokens": ASK["max_tokens"], "details": True}
    body = {"inputs": ASK["prompt"], "parameters": parameters}
    whole = post(server, "/generate", **body).json()
    assert whole["generated_text"] == texts["pirate"]
    streamed = post(server, "/generate_stream", **body).text
    events = [json.loads(line[5:]) for line in streamed.splitlines() if line]
    assert "".join(event["token"]["text"] for event in events) == texts["pirate"]
    assert [e["token"]["id"] for e in events] == [t["id"] for t in whole["details"]["tokens"]]
    assert events[-1]["generated_text"] == texts["pirate"]


def test_defaults_given_with_an_upload_are_the_requests(server):
    defaults = {"system_prompt": "You are terse.", "generation": {"max_tokens": 3}}
    body = {"name": "terse", "source": "file:pirate", "defaults": defaults}
    answer = post(server, "/v1/adapters", **body)
    assert answer.status_code == 201, answer.text
    with Client(base_url=server.base_url) as client:
        turn = [{"role": "user", "content": "Hello!"}]
        own = client.chat.create(model="terse", messages=turn)
        assert own.usage.completion_tokens == 3
        system = [{"role": "system", "content": "You are terse."}, *turn]
        plain = client.chat.create(model="pirate", messages=system, max_tokens=3)
        assert plain.usage.prompt_tokens == own.usage.prompt_tokens
        client.adapters.delete("terse")


def test_sglangs_pair_and_openais_client_end_an_adapter(server):
    answer = post(server, "/load_lora_adapter", lora_name="a/b", lora_path="sql", pinned=True)
    assert answer.json()["loaded_adapters"]["a/b"] == (EXAMPLES / "sql").as_uri()
    assert httpx.get(f"{server.base_url}/v1/adapters/a/b").json()["pinned"]
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0) as client:
        assert client.models.delete("a/b").deleted
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="a/b", prompt="x")
    answer = post(server, "/unload_lora_adapter", lora_name="a/b")
    assert (answer.status_code, answer.json()["success"]) == (400, False)


def test_one_call_asks_several_models_and_each_says_its_own(server, texts):
    body = post(server, "/v1/completions", models=[*texts], **ASK).json()
    assert {choice["model"]: choice["text"] for choice in body["choices"]} == texts
    assert body["metrics"]["time_to_first_token_ms"] > 0


def test_a_harness_scores_a_text_as_the_model_wrote_it(server):
    fields = {"model": "pirate", "logprobs": 1, "return_token_ids": True}
    [wrote] = post(server, "/v1/completions", **ASK, **fields).json()["choices"]
    whole = [*wrote["prompt_token_ids"], *wrote["token_ids"]]
    scored = post(
        server, "/v1/completions", prompt=whole, max_tokens=0, echo=True, **fields
    ).json()["choices"][0]
    num_prompt = len(wrote["prompt_token_ids"])
    scores = scored["logprobs"]["token_logprobs"]
    assert scores[0] is None
    assert scores[num_prompt:] == pytest.approx(wrote["logprobs"]["token_logprobs"], abs=1e-3)
    # It was greedy, so each token is its place's likeliest, as harnesses test it.
    tops = scored["logprobs"]["top_logprobs"][num_prompt:]
    assert [max(top.values()) for top in tops] == scores[num_prompt:]


def test_a_schema_makes_every_model_answer_in_json(server):
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
        "required": ["mood", "sure"],
        "additionalProperties": False,
    }
    wish = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    answer = post(
        server,
        "/v1/chat/completions",
        models=[BASE, "pirate", "sql"],
        messages=[{"role": "user", "content": "Ahoy! How are you?"}],
        response_format=wish,
        max_tokens=48,
        temperature=0,
    )
    choices = answer.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 3
    for choice in choices:
        said = json.loads(choice["message"]["content"])
        assert (said["mood"] in ("good", "bad"), type(said["sure"])) == (True, bool)


def test_adapters_embed_differently_and_always_alike(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:

        def embed(model: str) -> list[float]:
            texts = ["a ship at sea", "select a row"]
            return client.embeddings.create(model=model, input=texts).data[0].embedding

        base, pirate = embed(BASE), embed("pirate")
        assert embed("pirate") == pytest.approx(pirate, abs=1e-4)
    dot = sum(a * b for a, b in zip(base, pirate, strict=True))
    assert sum(number * number for number in base) == pytest.approx(1.0, abs=1e-3)
    assert dot < 0.9999
