from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from loraplex_server.api.answer_shape import StructuredOutputs
from loraplex_server.api.chat_messages import ChatMessage
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.embeddings import EmbeddingBody
from loraplex_server.api.error_table import ERROR_TABLE
from loraplex_server.api.lorax_schemas import LoraxBody, LoraxParameters
from loraplex_server.api.schemas import StreamOptions
from loraplex_server.api.sglang_adapters import SglangLoad
from loraplex_server.api.tokenize import DetokenizeBody, TokenizeBody
from loraplex_server.api.vllm_adapters import VllmLoad, VllmUnload

_DOCS = Path(__file__).parents[3] / "docs"
DOCUMENT = "".join(path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md")))


def test_every_error_code_is_documented():
    missing = {shape.code for shape in ERROR_TABLE.values() if f"`{shape.code}`" not in DOCUMENT}
    assert missing == set()


FOREIGN = [LoraxBody, LoraxParameters, SglangLoad, VllmLoad, VllmUnload]


OTHERS = [EmbeddingBody, TokenizeBody, DetokenizeBody, StructuredOutputs, *FOREIGN]


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, *OTHERS])
def test_every_field_is_documented(body):
    names = [field.alias or name for name, field in body.model_fields.items()]
    assert [name for name in names if f"`{name}" not in DOCUMENT] == []


@pytest.mark.parametrize("name", StreamOptions.model_fields)
def test_every_option_of_a_stream_is_documented(name):
    assert f"`stream_options.{name}`" in DOCUMENT


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, StreamOptions, *OTHERS])
def test_every_unsupported_field_is_documented(body):
    switches = {"add_generation_prompt", "echo", "parallel_tool_calls", "include_obfuscation"}
    names = set(body.unsupported) - switches
    assert [name for name in sorted(names) if f"`{name}`" not in DOCUMENT] == []
    assert {"audio", "function_call"} <= set(ChatMessage.unsupported)


def test_every_metric_is_documented(server):
    text = httpx.get(f"{server.url}/metrics").text
    helped = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    names = {name.removesuffix("_created") for name in helped}
    assert names
    assert [name for name in sorted(names) if f"`{name}" not in DOCUMENT] == []


def test_every_path_is_documented(server):
    paths = httpx.get(f"{server.url}/openapi.json", timeout=20).json()["paths"]
    documented = DOCUMENT.replace("{id}", "{name}")
    assert [path for path in paths if path not in documented] == []
