"""What the counters of requests say after requests of every kind, over HTTP."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_scheduler.plan import EndEvent, FinishReason
from loraplex_server.engine.messages import EngineStats
from tests.server.api.conftest import BASE, make_adapter, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("measured")
    settings = {"tenant_header": "x-tenant", "metrics_top_k": 2}
    with running_server(folder / "data", vocabulary, **settings) as server:
        for number, name in enumerate(("team/one", "two", "three", "other")):
            server.upload(name, make_adapter(folder / name, seed=number, rank=4 * (number + 1)))
        yield server


def samples(server) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and the values of its labels, in the labels' order."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def changes(server, ask) -> dict[tuple[str, ...], float]:
    """Return by how much each sample grew while `ask` was called."""
    before = samples(server)
    ask()
    after = samples(server)
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def complete(server, model: str, tenant: str = "", **fields) -> httpx.Response:
    body = {"model": model, "prompt": "hello world", **fields}
    headers = {"x-tenant": tenant} if tenant else {}
    url = f"{server.url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=20)


def test_an_answer_is_counted_for_its_adapter_and_its_tenant(server):
    usage = {}

    def ask():
        usage.update(complete(server, "team/one", "acme", n=2).json()["usage"])

    grown = changes(server, ask)
    for what, name in (("adapter", "team/one"), ("tenant", "acme")):
        counted = {
            column: grown[f"loraplex_{what}_{column}_total", name]
            for column in (
                "requests",
                "prompt_tokens",
                "generated_tokens",
                "errors",
                "first_tokens",
            )
        }
        assert counted == {
            "requests": 2,
            "prompt_tokens": usage["prompt_tokens"],
            "generated_tokens": usage["completion_tokens"],
            "errors": 0,
            "first_tokens": 2,
        }
        assert grown[f"loraplex_{what}_ttft_seconds_total", name] == pytest.approx(
            grown["loraplex_time_to_first_token_seconds_sum",]
        )


def test_vllms_names_say_the_same_as_ours(server):
    grown = changes(server, lambda: complete(server, "team/one", max_tokens=2))
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        for part in ("count", "sum"):
            ours = grown[f"loraplex_{name}_seconds_{part}",]
            assert grown[f"vllm:{name}_seconds_{part}", BASE] == ours > 0
    assert grown["vllm:request_success_total", "length", BASE] == 1
    assert grown["vllm:request_prompt_tokens_sum", BASE] == 2
    assert grown["vllm:prompt_tokens_total", BASE] == 2
    assert grown["vllm:request_generation_tokens_sum", BASE] == 2
    for name in ("queue", "prefill", "decode", "inference"):
        assert grown[f"vllm:request_{name}_time_seconds_count", BASE] == 1
    assert grown["vllm:request_time_per_output_token_seconds_count", BASE] == 1
    assert grown["loraplex_request_adapter_wait_seconds_count",] == 1


def test_the_base_model_waits_for_no_adapter(server):
    grown = changes(server, lambda: complete(server, BASE))
    assert grown["loraplex_request_adapter_wait_seconds_count",] == 0
    assert grown["vllm:request_queue_time_seconds_count", BASE] == 1


def test_failures_are_errors_of_their_adapter_and_cancellations_are_not(server):
    server.engine.end_with = EndEvent("", FinishReason.FAILED, "broken")
    try:
        grown = changes(server, lambda: complete(server, "team/one", "acme"))
    finally:
        server.engine.end_with = None
    assert grown["loraplex_adapter_errors_total", "team/one"] == 1
    assert grown["loraplex_tenant_errors_total", "acme"] == 1
    assert grown["vllm:request_success_total", "error", BASE] == 1
    server.engine.end_with = EndEvent("", FinishReason.CANCELLED)
    try:
        grown = changes(server, lambda: complete(server, "team/one", "acme"))
    finally:
        server.engine.end_with = None
    assert grown["loraplex_adapter_errors_total", "team/one"] == 0
    assert grown["vllm:request_success_total", "abort", BASE] == 1


def test_sums_over_adapters_and_tenants_are_totals(server):
    def ask():
        for name in ("team/one", "two", "three", "other", BASE):
            for tenant in ("", "acme", "b", "c"):
                assert complete(server, name, tenant).is_success
        assert complete(server, "team/one", adapters=None).is_success

    grown = changes(server, ask)
    for what in ("adapter", "tenant"):
        rows = {k[1]: v for k, v in grown.items() if k[0] == f"loraplex_{what}_requests_total"}
        assert len(rows) == 3
        assert sum(rows.values()) == 21
        tokens = [v for k, v in grown.items() if k[0] == f"loraplex_{what}_generated_tokens_total"]
        assert sum(tokens) == grown["vllm:request_generation_tokens_sum", BASE]


def test_only_the_busiest_adapters_are_named_with_their_rank_and_level(server):
    ids = {name: server.catalog.get(name).id for name in ("team/one", "three")}
    for name in ids:
        complete(server, name)
    shown = [k[1] for k in samples(server) if k[0] == "loraplex_adapter_requests_total"]
    assert "team/one" in shown
    assert "three" not in shown
    server.engine.stats = EngineStats(
        resident={ids["team/one"]: 2, ids["three"]: 6}, host_adapters=(ids["team/one"],)
    )
    page = samples(server)
    loaded = {key[1:] for key in page if key[0] == "vllm:lora_adapter_loaded"}
    assert loaded == {
        ("team/one", "0", "gpu", "false", "4"),
        ("team/one", "0", "cpu", "false", "4"),
    }
    assert page["vllm:num_gpu_loaded_lora_adapters", BASE] == 2
    assert page["vllm:num_cpu_loaded_lora_adapters", BASE] == 1


def test_routers_are_told_the_size_of_a_block_and_how_many_there_are(server):
    assert samples(server)["vllm:cache_config_info", "16", BASE, "64"] == 1
