"""Libraries that agents are built with: LangChain and LiteLLM, with a tool to call."""

from __future__ import annotations

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from tests.server.api.conftest import BASE
from tests.server.api.test_tools import CALL, TIME, WEATHER, roomy, says

__all__ = ["roomy"]


@pytest.mark.parametrize("uses_responses", [False, True])
def test_langchain_calls_a_tool_and_reads_the_answer(server, uses_responses):
    model = ChatOpenAI(
        model=BASE,
        base_url=f"{server.url}/v1",
        api_key="x",
        max_tokens=200,
        use_responses_api=uses_responses,
    ).bind_tools([WEATHER, TIME])
    says(server, CALL)
    asked = model.invoke("weather?")
    [call] = asked.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    chunks = list(model.stream("weather?"))
    streamed = sum(chunks[1:], chunks[0])
    assert [c["args"] for c in streamed.tool_calls] == [{"city": "Oslo"}]
    says(server, "It rains.")
    result = ToolMessage("rain", tool_call_id=call["id"])
    assert model.invoke([HumanMessage("weather?"), asked, result]).text == "It rains."


@pytest.mark.filterwarnings("ignore")  # litellm's own
@pytest.mark.parametrize(("provider", "path"), [("openai", "/v1"), ("anthropic", "")])
def test_litellm_calls_a_tool_through_both_apis(server, monkeypatch, provider, path):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    says(server, CALL)
    answer = litellm.completion(
        model=f"{provider}/{BASE}",
        api_base=f"{server.url}{path}",
        api_key="x",
        messages=[{"role": "user", "content": "weather?"}],
        tools=[WEATHER],
        max_tokens=200,
    )
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
