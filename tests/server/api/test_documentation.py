from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.api.answer_shape import StructuredOutputs
from loraplex_server.api.chat_messages import ChatMessage
from loraplex_server.api.chat_schemas import ChatBody
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.embeddings import EmbeddingBody
from loraplex_server.api.error_table import ERROR_TABLE
from loraplex_server.api.lorax_schemas import LoraxBody, LoraxParameters
from loraplex_server.api.messages_schemas import CountBody, MessagesBody, OutputConfig
from loraplex_server.api.responses_schemas import ResponsesBody, TextConfig
from loraplex_server.api.schemas import StreamOptions
from loraplex_server.api.series import SERIES, Kind
from loraplex_server.api.sglang_adapters import SglangLoad
from loraplex_server.api.tokenize import DetokenizeBody, TokenizeBody
from loraplex_server.api.vllm_adapters import VllmLoad, VllmUnload

_DOCS = Path(__file__).parents[3] / "docs"
DOCUMENT = "".join(path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md")))


def test_every_error_code_is_documented():
    missing = {shape.code for shape in ERROR_TABLE.values() if f"`{shape.code}`" not in DOCUMENT}
    assert missing == set()


FOREIGN = [LoraxBody, LoraxParameters, SglangLoad, VllmLoad, VllmUnload]


DIALOGUE = [ChatBody, ChatMessage, ResponsesBody, TextConfig, CountBody, MessagesBody, OutputConfig]
OTHERS = [EmbeddingBody, TokenizeBody, DetokenizeBody, StructuredOutputs, *DIALOGUE, *FOREIGN]


@pytest.mark.parametrize("body", [CompletionBody, *OTHERS])
def test_every_field_is_documented(body):
    names = [field.alias or name for name, field in body.model_fields.items()]
    assert [name for name in names if f"`{name}" not in DOCUMENT] == []


@pytest.mark.parametrize("name", StreamOptions.model_fields)
def test_every_option_of_a_stream_is_documented(name):
    assert f"`stream_options.{name}`" in DOCUMENT


@pytest.mark.parametrize("body", [CompletionBody, StreamOptions, *OTHERS])
def test_every_unsupported_field_is_documented(body):
    names = set(body.unsupported) - {"include_obfuscation"}
    assert [name for name in sorted(names) if f"`{name}`" not in DOCUMENT] == []


def documented_series() -> dict[str, str]:
    """Return kind and unit of every series in the tables of docs/metrics.md, as written there."""
    text = (_DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| `[a-z_]+[:_]", line)]
    return {row[0].removeprefix("| "): row[1] for row in rows}


def test_the_tables_of_metrics_are_the_declared_series():
    declared = {}
    for series in SERIES.values():
        name = series.name if series.kind is Kind.HISTOGRAM else series.exposed_names[0]
        labels = "{" + ", ".join(series.labels) + "}" if series.labels else ""
        unit = f", {series.unit}" if series.unit else ""
        declared[f"`{name}{labels}`"] = f"{series.kind}{unit}"
    assert documented_series() == declared


def test_the_page_shows_every_declared_series_and_no_other(server):
    text = httpx.get(f"{server.url}/metrics").text
    shown = {}
    for family in text_string_to_metric_families(text):
        shown[family.name] = family
    assert shown.keys() == SERIES.keys()
    for name, family in shown.items():
        series = SERIES[name]
        assert family.type == series.kind
        assert family.documentation == series.help
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert labels <= {frozenset(series.labels)}


def test_every_path_is_documented(server):
    paths = httpx.get(f"{server.url}/openapi.json", timeout=20).json()["paths"]
    documented = DOCUMENT.replace("{id}", "{name}")
    assert [path for path in paths if path not in documented] == []
