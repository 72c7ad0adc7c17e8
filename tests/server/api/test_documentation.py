from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from loraplex_server.api.chat_messages import ChatMessage
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.error_table import ERROR_TABLE
from loraplex_server.api.lorax_schemas import LoraxBody, LoraxParameters
from loraplex_server.api.messages_schemas import CountBody, MessagesBody, OutputConfig
from loraplex_server.api.responses_schemas import ResponsesBody, TextConfig
from loraplex_server.api.schemas import StreamOptions
from loraplex_server.api.sglang_adapters import SglangLoad
from loraplex_server.api.vllm_adapters import VllmLoad, VllmUnload

_DOCS = Path(__file__).parents[3] / "docs"
DOCUMENT = "".join(path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md")))


def test_every_error_code_is_documented():
    missing = {shape.code for shape in ERROR_TABLE.values() if f"`{shape.code}`" not in DOCUMENT}
    assert missing == set()


FOREIGN = [LoraxBody, LoraxParameters, SglangLoad, VllmLoad, VllmUnload]


DIALOGUE = [ChatBody, ChatMessage, ResponsesBody, TextConfig, CountBody, MessagesBody, OutputConfig]


@pytest.mark.parametrize("body", [CompletionBody, *DIALOGUE, *FOREIGN])
def test_every_field_is_documented(body):
    accepted = [name for name in body.model_fields if f"`{name}" not in DOCUMENT]
    assert accepted == []


@pytest.mark.parametrize("body", [CompletionBody, StreamOptions, *DIALOGUE, *FOREIGN])
def test_every_unsupported_field_is_documented(body):
    switches = {"add_generation_prompt", "echo", "parallel_tool_calls", "include_obfuscation"}
    names = {name for name in body.unsupported if not name.startswith("guided_")} - switches
    assert [name for name in sorted(names) if f"`{name}`" not in DOCUMENT] == []


def test_every_metric_is_documented(server):
    text = httpx.get(f"{server.url}/metrics").text
    helped = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    names = {name.removesuffix("_created") for name in helped}
    assert names
    assert [name for name in sorted(names) if f"`{name}" not in DOCUMENT] == []


def test_every_path_is_documented(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    documented = DOCUMENT.replace("{id}", "{name}")
    assert [path for path in paths if path not in documented] == []
