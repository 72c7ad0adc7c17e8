"""Every series that `/metrics` shows, declared once: what exporters, documents and tests go by.

Names are as Prometheus' text format has them in its `# TYPE` lines, so counters without `_total`
and histograms without `_bucket`. A series that is not here cannot be exported: exporters take it
by name from `SERIES`. Series named `vllm:` are vLLM's own, by its names and to its meaning, for
routers, autoscalers and dashboards that exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from loraplex_server.engine.step_meter import (
    LOAD_S,
    STEP_ADAPTERS,
    STEP_S,
    STEP_SEQUENCES,
    STEP_TOKENS,
)


class Kind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Series:
    """One metric family.

    Attributes:
        help: one sentence, for people who meet it in a query editor.
        unit: of its values; "" of counts and shares.
        borders: upper ones of a histogram's buckets, ascending, without infinity.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    borders: tuple[float, ...] = ()

    @property
    def exposed_names(self) -> tuple[str, ...]:
        """The names that queries use."""
        if self.kind is Kind.COUNTER:
            return (f"{self.name}_total",)
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


# Bucket borders, as vLLM has them, so that its dashboards fit.
TTFT_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
REQUEST_TOKENS: Final = tuple(m * 10.0**e for e in range(6) for m in (1, 2, 5))
#: A loop that is late by 10 ms delays every token by as much.
LAG_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_G, _C, _H = Kind.GAUGE, Kind.COUNTER, Kind.HISTOGRAM

#: Of the engine process; its counters begin again when that process does.
ENGINE: Final = (
    Series("loraplex_pool_pages", _G, "Pages of the pool by use.", ("use",), "pages"),
    Series("loraplex_requests_running", _G, "Sequences in the running batch."),
    Series("loraplex_requests_waiting", _G, "Sequences waiting for pages or an adapter."),
    Series("loraplex_resident_adapters", _G, "Adapters in the pool and ready to serve."),
    Series("loraplex_loading_adapters", _G, "Adapters on their way into the pool."),
    Series("loraplex_running_adapters", _G, "Adapters that running sequences use."),
    Series("loraplex_waiting_adapters", _G, "Adapters that waiting sequences want."),
    Series("loraplex_host_adapters", _G, "Adapters in host memory."),
    Series("loraplex_host_bytes", _G, "Host memory that adapters take.", (), "bytes"),
    Series("loraplex_host_capacity_bytes", _G, "Host memory for adapters.", (), "bytes"),
    Series("loraplex_engine_ready", _G, "1 when the engine serves."),
    Series("loraplex_engine_restarts", _C, "Deaths of the engine process that were survived."),
    Series("loraplex_engine_steps", _C, "Steps that computed something."),
    Series("loraplex_engine_step_seconds", _C, "Time spent inside steps.", (), "seconds"),
    Series("loraplex_engine_step_duration_seconds", _H, "Time of one step.", (), "seconds", STEP_S),
    Series(
        "loraplex_engine_step_part_seconds",
        _C,
        "Host time in each part of steps; on a GPU forward is waiting for the device.",
        ("part",),
        "seconds",
    ),
    Series("loraplex_step_sequences", _H, "Sequences of one step.", (), "", STEP_SEQUENCES),
    Series("loraplex_step_adapters", _H, "Distinct adapters of one step.", (), "", STEP_ADAPTERS),
    Series("loraplex_step_tokens", _C, "Tokens computed, by phase.", ("phase",), "tokens"),
    Series("loraplex_preemptions", _C, "Sequences that gave back their pages."),
    Series("loraplex_adapter_wants", _C, "Adapters that requests named, by tier.", ("tier",)),
    Series("loraplex_adapter_loads", _C, "Adapters loaded into the pool."),
    Series("loraplex_adapter_load_seconds", _C, "Time spent loading adapters.", (), "seconds"),
    Series(
        "loraplex_adapter_load_duration_seconds",
        _H,
        "Time of one load into the pool, by where it came from.",
        ("tier",),
        "seconds",
        LOAD_S,
    ),
    Series("loraplex_adapter_host_hits", _C, "Adapters that host memory held when wanted."),
    Series("loraplex_adapter_prefetches", _C, "Adapters brought into host memory early."),
    Series("loraplex_adapter_load_failures", _C, "Loads that failed."),
    Series("loraplex_adapter_evictions", _C, "Adapters evicted from the pool.", ("cause",)),
    Series("loraplex_prefix_evictions", _C, "Pages the prefix cache gave up.", (), "pages"),
    Series("loraplex_prefix_hit_tokens", _C, "Prompt tokens found cached.", (), "tokens"),
    Series("loraplex_prefix_query_tokens", _C, "Prompt tokens looked for.", (), "tokens"),
    Series("loraplex_prompt_tokens", _C, "Prompt tokens computed, again included.", (), "tokens"),
    Series("loraplex_generated_tokens", _C, "Tokens generated.", (), "tokens"),
    Series("loraplex_fair_clients", _G, "Clients of the fair queue with something waiting."),
    Series(
        "loraplex_fair_service_spread",
        _G,
        "Weighted service between the most and the least served client that waits.",
        (),
        "tokens",
    ),
)

#: Of the API process.
REQUESTS: Final = (
    Series("loraplex_requests_finished", _C, "Sequences that ended, by outcome.", ("outcome",)),
    Series("loraplex_requests_rejected", _C, "429s, by the error's code.", ("reason",)),
    Series(
        "loraplex_time_to_first_token_seconds",
        _H,
        "From a request's arrival to its first token.",
        (),
        "seconds",
        TTFT_S,
    ),
    Series(
        "loraplex_inter_token_latency_seconds",
        _H,
        "Between two deliveries of tokens of one sequence.",
        (),
        "seconds",
        INTER_TOKEN_S,
    ),
    Series(
        "loraplex_e2e_request_latency_seconds",
        _H,
        "From a request's arrival to its end.",
        (),
        "seconds",
        REQUEST_S,
    ),
    Series(
        "loraplex_request_adapter_wait_seconds",
        _H,
        "Waiting for nothing but the adapter, of sequences with one.",
        (),
        "seconds",
        TTFT_S,
    ),
)

#: Of the busiest names and `other`; see `TopNames`.
TOP: Final = (
    Series("loraplex_adapter_requests", _C, "Sequences, by model or adapter.", ("adapter",)),
    Series("loraplex_adapter_prompt_tokens", _C, "Tokens of prompts.", ("adapter",), "tokens"),
    Series("loraplex_adapter_generated_tokens", _C, "Tokens of answers.", ("adapter",), "tokens"),
    Series("loraplex_adapter_errors", _C, "Sequences that ended badly.", ("adapter",)),
    Series("loraplex_adapter_ttft_seconds", _C, "Times to first token.", ("adapter",), "seconds"),
    Series("loraplex_adapter_first_tokens", _C, "Sequences that got one.", ("adapter",)),
    Series("loraplex_tenant_requests", _C, "Sequences, by tenant.", ("tenant",)),
    Series("loraplex_tenant_prompt_tokens", _C, "Tokens of prompts.", ("tenant",), "tokens"),
    Series("loraplex_tenant_generated_tokens", _C, "Tokens of answers.", ("tenant",), "tokens"),
    Series("loraplex_tenant_errors", _C, "Sequences that ended badly.", ("tenant",)),
    Series("loraplex_tenant_ttft_seconds", _C, "Times to first token.", ("tenant",), "seconds"),
    Series("loraplex_tenant_first_tokens", _C, "Sequences that got one.", ("tenant",)),
)

#: Of the API process.
SERVICE: Final = (
    Series(
        "loraplex_http_requests",
        _C,
        "HTTP requests that were answered.",
        ("method", "route", "status"),
    ),
    Series("loraplex_http_requests_open", _G, "HTTP requests being answered."),
    Series("loraplex_sse_streams_open", _G, "Streams of events being written."),
    Series(
        "loraplex_event_loop_lag_seconds",
        _H,
        "How late the API process's event loop is, measured ten times a second.",
        (),
        "seconds",
        LAG_S,
    ),
    Series(
        "loraplex_registry_age_seconds",
        _G,
        "How old what the server knows of a shared registry is at most.",
        (),
        "seconds",
    ),
    # Of the API process; by prometheus_client, whose words these are.
    Series("process_virtual_memory_bytes", _G, "Virtual memory size in bytes.", (), "bytes"),
    Series("process_resident_memory_bytes", _G, "Resident memory size in bytes.", (), "bytes"),
    Series(
        "process_start_time_seconds",
        _G,
        "Start time of the process since unix epoch in seconds.",
        (),
        "seconds",
    ),
    Series(
        "process_cpu_seconds", _C, "Total user and system CPU time spent in seconds.", (), "seconds"
    ),
    Series("process_open_fds", _G, "Number of open file descriptors."),
    Series("process_max_fds", _G, "Maximum number of open file descriptors."),
)

_MODEL: Final = ("model_name",)

VLLM: Final = (
    Series("vllm:num_requests_running", _G, "Sequences in the running batch.", _MODEL),
    Series("vllm:num_requests_waiting", _G, "Sequences that wait.", _MODEL),
    Series("vllm:kv_cache_usage_perc", _G, "Share of pages in use, 0 to 1.", _MODEL),
    Series(
        "vllm:cache_config_info",
        _G,
        "1; the labels tell the size of the pool.",
        ("model_name", "block_size", "num_gpu_blocks"),
    ),
    Series(
        "vllm:lora_requests_info",
        _G,
        "Adapters ready to serve and adapters waited for; the value is the Unix time.",
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        "seconds",
    ),
    Series(
        "vllm:lora_adapter_loaded",
        _G,
        "1 of each of the busiest adapters that is in the pool (gpu) or in host memory (cpu).",
        ("adapter_name", "level", "pinned", "rank", "engine"),
    ),
    Series("vllm:num_gpu_loaded_lora_adapters", _G, "Adapters in the pool.", _MODEL),
    Series("vllm:num_cpu_loaded_lora_adapters", _G, "Adapters in host memory.", _MODEL),
    Series("vllm:max_gpu_lora_adapters", _G, "Adapters of mean size the pool holds.", _MODEL),
    Series("vllm:lora_adapter_load_seconds", _H, "Time of one load.", _MODEL, "seconds", LOAD_S),
    Series("vllm:prefix_cache_queries", _C, "Prompt tokens looked for.", _MODEL, "tokens"),
    Series("vllm:prefix_cache_hits", _C, "Prompt tokens found cached.", _MODEL, "tokens"),
    Series("vllm:num_preemptions", _C, "Sequences preempted.", _MODEL),
    Series("vllm:prompt_tokens", _C, "Tokens of prompts that were begun.", _MODEL, "tokens"),
    Series("vllm:generation_tokens", _C, "Tokens generated.", _MODEL, "tokens"),
    Series(
        "vllm:request_success",
        _C,
        "Sequences that ended, by vLLM's reasons.",
        ("model_name", "finished_reason"),
    ),
    Series("vllm:iteration_tokens_total", _H, "Tokens of one step.", _MODEL, "tokens", STEP_TOKENS),
    Series("vllm:request_prompt_tokens", _H, "Of a prompt.", _MODEL, "tokens", REQUEST_TOKENS),
    Series("vllm:request_generation_tokens", _H, "Of an answer.", _MODEL, "tokens", REQUEST_TOKENS),
    Series("vllm:time_to_first_token_seconds", _H, "From arrival.", _MODEL, "seconds", TTFT_S),
    Series(
        "vllm:inter_token_latency_seconds",
        _H,
        "Between two deliveries.",
        _MODEL,
        "seconds",
        INTER_TOKEN_S,
    ),
    Series(
        "vllm:request_time_per_output_token_seconds",
        _H,
        "Mean of one answer, without its first token.",
        _MODEL,
        "seconds",
        INTER_TOKEN_S,
    ),
    Series("vllm:e2e_request_latency_seconds", _H, "Arrival to end.", _MODEL, "seconds", REQUEST_S),
    Series(
        "vllm:request_queue_time_seconds",
        _H,
        "Before the first step.",
        _MODEL,
        "seconds",
        REQUEST_S,
    ),
    Series(
        "vllm:request_prefill_time_seconds",
        _H,
        "First step to first token.",
        _MODEL,
        "seconds",
        REQUEST_S,
    ),
    Series(
        "vllm:request_decode_time_seconds",
        _H,
        "First token to last.",
        _MODEL,
        "seconds",
        REQUEST_S,
    ),
    Series(
        "vllm:request_inference_time_seconds",
        _H,
        "First step to last token.",
        _MODEL,
        "seconds",
        REQUEST_S,
    ),
)

ALL: Final = (*ENGINE, *REQUESTS, *TOP, *SERVICE, *VLLM)

SERIES: Final[Mapping[str, Series]] = {series.name: series for series in ALL}
