from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.api.chat_schemas import ChatBody, ChatMessage
from loraplex_server.api.completion_schemas import CompletionBody
from loraplex_server.api.error_table import ERROR_TABLE
from loraplex_server.api.lorax_schemas import LoraxBody, LoraxParameters
from loraplex_server.api.schemas import StreamOptions
from loraplex_server.api.series import SERIES, Kind
from loraplex_server.api.sglang_adapters import SglangLoad
from loraplex_server.api.vllm_adapters import VllmLoad, VllmUnload

_DOCS = Path(__file__).parents[3] / "docs"
DOCUMENT = "".join(path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md")))


def test_every_error_code_is_documented():
    missing = {shape.code for shape in ERROR_TABLE.values() if f"`{shape.code}`" not in DOCUMENT}
    assert missing == set()


FOREIGN = [LoraxBody, LoraxParameters, SglangLoad, VllmLoad, VllmUnload]


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, *FOREIGN])
def test_every_field_is_documented(body):
    accepted = [name for name in body.model_fields if f"`{name}" not in DOCUMENT]
    assert accepted == []


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, StreamOptions, *FOREIGN])
def test_every_unsupported_field_is_documented(body):
    switches = {"add_generation_prompt", "echo", "parallel_tool_calls", "include_obfuscation"}
    names = {name for name in body.unsupported if not name.startswith("guided_")} - switches
    assert [name for name in sorted(names) if f"`{name}`" not in DOCUMENT] == []
    assert {"name", "tool_calls"} <= set(ChatMessage.unsupported)


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
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    documented = DOCUMENT.replace("{id}", "{name}")
    assert [path for path in paths if path not in documented] == []
