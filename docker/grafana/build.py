"""Write the dashboards: `python docker/grafana/build.py`. A test compares what is committed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

from dashboard import Dashboard, Panel, Query, Variable

FOLDER: Final = Path(__file__).parent / "dashboards"

_INSTANCE: Final = Variable("instance", "instance", "loraplex_engine_ready")
_MODEL: Final = Variable("model", "model_name", "vllm:num_requests_running")
_ADAPTER: Final = Variable("adapter", "adapter", "loraplex_adapter_requests_total")
_TENANT: Final = Variable("tenant", "tenant", "loraplex_tenant_requests_total")

_I: Final = 'instance=~"$instance"'
_VLLM: Final = _I + ', model_name=~"$model"'
_QUANTILES: Final = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


def rate(series: str, labels: str = _I) -> str:
    """Return the rate of a counter per second."""
    return f"rate({series}{{{labels}}}[$__rate_interval])"


def total(series: str, by: str = "", labels: str = _I) -> str:
    """Return the rate of a counter, added up."""
    return f"sum by ({by}) ({rate(series, labels)})" if by else f"sum({rate(series, labels)})"


def quantiles(series: str, labels: str = _I) -> tuple[Query, ...]:
    """Return median, 95th and 99th percentile of a histogram over all instances."""
    buckets = total(f"{series}_bucket", "le", labels)
    return tuple(Query(f"histogram_quantile({q}, {buckets})", name) for q, name in _QUANTILES)


def mean(series: str, by: str, labels: str = _I) -> str:
    """Return the mean of a histogram."""
    return f"{total(series + '_sum', by, labels)} / {total(series + '_count', by, labels)}"


def one(expr: str, legend: str = "") -> tuple[Query, ...]:
    """Return one query."""
    return (Query(expr, legend),)


OVERVIEW: Final = Dashboard(
    "loraplex-overview",
    "loraplex / overview",
    "Is it well, how fast is it, and what is it doing?",
    (_INSTANCE, _MODEL),
    (
        (
            "Now",
            (
                Panel(
                    "Engines ready",
                    "Servers whose engine serves. Fewer than there are servers: see the alert "
                    "LoraplexEngineNotReady.",
                    "short",
                    one(f"sum(loraplex_engine_ready{{{_I}}})"),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Running",
                    "Sequences in the running batches.",
                    "short",
                    one(f"sum(loraplex_requests_running{{{_I}}})"),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Waiting",
                    "Sequences that wait for pages or an adapter. If it only grows, add replicas.",
                    "short",
                    one(f"sum(loraplex_requests_waiting{{{_I}}})"),
                    (1, 100),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Errors",
                    "Share of sequences of the last 5 minutes that failed, timed out or were shed.",
                    "percentunit",
                    one(f"max(loraplex:request_errors:ratio_rate5m{{{_I}}})"),
                    (0.01, 0.144),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Slow first tokens",
                    "Share of first tokens of the last 5 minutes that took over 2.5 s.",
                    "percentunit",
                    one(f"max(loraplex:slow_first_tokens:ratio_rate5m{{{_I}}})"),
                    (0.05, 0.5),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Engine restarts, 1 h",
                    "Deaths of engine processes. Each fails all running requests: see the log.",
                    "short",
                    one(f"sum(increase(loraplex_engine_restarts_total{{{_I}}}[1h]))"),
                    (1,),
                    kind="stat",
                    width=4,
                    height=4,
                ),
            ),
        ),
        (
            "Traffic",
            (
                Panel(
                    "Sequences ended",
                    "By outcome. refused could never run; rejected was shed; cancelled went away.",
                    "reqps",
                    one(total("loraplex_requests_finished_total", "outcome"), "{{outcome}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens computed (recomputation included) and tokens generated.",
                    "short",
                    (
                        Query(total("vllm:generation_tokens_total", "", _VLLM), "generated"),
                        Query(total("loraplex_prompt_tokens_total"), "prompt"),
                    ),
                ),
                Panel(
                    "429 by reason",
                    "overloaded and queue_full want capacity; tenant_queue_full and "
                    "quota_exceeded are a tenant's own limits.",
                    "reqps",
                    one(total("loraplex_requests_rejected_total", "reason"), "{{reason}}"),
                    is_stacked=True,
                ),
            ),
        ),
        (
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "From a request's arrival. Its parts are in the next row.",
                    "s",
                    quantiles("loraplex_time_to_first_token_seconds"),
                    (2.5,),
                ),
                Panel(
                    "Between tokens",
                    "Between two deliveries of one sequence. Grows with the step time.",
                    "s",
                    quantiles("loraplex_inter_token_latency_seconds"),
                    (0.2,),
                ),
                Panel(
                    "Whole answer",
                    "From a request's arrival to its end.",
                    "s",
                    quantiles("loraplex_e2e_request_latency_seconds"),
                ),
                Panel(
                    "What answers spend their time on",
                    "Means. Much queue: more replicas. Much adapter: host memory, pins. Much "
                    "prefill: long prompts, or preemption.",
                    "s",
                    (
                        Query(mean("vllm:request_queue_time_seconds", "", _VLLM), "queue"),
                        Query(mean("loraplex_request_adapter_wait_seconds", ""), "adapter"),
                        Query(mean("vllm:request_prefill_time_seconds", "", _VLLM), "prefill"),
                        Query(mean("vllm:request_decode_time_seconds", "", _VLLM), "decode"),
                    ),
                ),
                Panel(
                    "Queue (p95)",
                    "Before the first step, without waiting for an adapter alone.",
                    "s",
                    quantiles("vllm:request_queue_time_seconds", _VLLM)[1:2],
                    (1.0,),
                ),
                Panel(
                    "Lengths (mean)",
                    "Tokens of prompts and answers: what changed when latency did?",
                    "short",
                    (
                        Query(mean("vllm:request_prompt_tokens", "", _VLLM), "prompt"),
                        Query(mean("vllm:request_generation_tokens", "", _VLLM), "answer"),
                    ),
                ),
            ),
        ),
        (
            "Engine",
            (
                Panel(
                    "Step time",
                    "Of one step of the engine; every running sequence gets a token from it.",
                    "s",
                    quantiles("loraplex_engine_step_duration_seconds"),
                ),
                Panel(
                    "Parts of steps",
                    "Share of a core. schedule and build are Python's; on a GPU forward is "
                    "waiting for the device, and is best near 1.",
                    "percentunit",
                    one(total("loraplex_engine_step_part_seconds_total", "part"), "{{part}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Sequences of a step",
                    "How full the batch is.",
                    "short",
                    quantiles("loraplex_step_sequences"),
                ),
                Panel(
                    "Tokens computed, by phase",
                    "Much prefill beside decode makes tokens come slower.",
                    "short",
                    one(total("loraplex_step_tokens_total", "phase"), "{{phase}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Tokens of a step",
                    "At max_step_tokens, prompts are computed in pieces.",
                    "short",
                    quantiles("vllm:iteration_tokens_total", _VLLM),
                ),
                Panel(
                    "Preemptions",
                    "Sequences that gave back their pages: see the dashboard memory.",
                    "reqps",
                    one(total("loraplex_preemptions_total", "instance"), "{{instance}}"),
                    (0.1,),
                ),
            ),
        ),
        (
            "API process",
            (
                Panel(
                    "Event-loop lag",
                    "Every stream is as late. Above 100 ms the process lacks CPU.",
                    "s",
                    quantiles("loraplex_event_loop_lag_seconds"),
                    (0.025, 0.1),
                ),
                Panel(
                    "HTTP answers",
                    "By route and status.",
                    "reqps",
                    one(
                        total("loraplex_http_requests_total", "route, status"),
                        "{{route}} {{status}}",
                    ),
                ),
                Panel(
                    "Open",
                    "Requests being answered, and those of them that are streams.",
                    "short",
                    (
                        Query(f"sum(loraplex_http_requests_open{{{_I}}})", "requests"),
                        Query(f"sum(loraplex_sse_streams_open{{{_I}}})", "streams"),
                    ),
                ),
                Panel(
                    "CPU",
                    "Cores that the API process uses; it can use one.",
                    "percentunit",
                    one(rate("process_cpu_seconds_total"), "{{instance}}"),
                    (0.7, 0.9),
                ),
                Panel(
                    "Memory",
                    "Resident memory of the API process. Steady growth is worth a report.",
                    "bytes",
                    one(f"process_resident_memory_bytes{{{_I}}}", "{{instance}}"),
                ),
                Panel(
                    "File descriptors",
                    "Share of those it may have; connections are what takes them.",
                    "percentunit",
                    one(
                        f"process_open_fds{{{_I}}} / process_max_fds{{{_I}}}",
                        "{{instance}}",
                    ),
                    (0.7, 0.9),
                ),
            ),
        ),
    ),
)

_A: Final = _I + ', adapter=~"$adapter"'
_T: Final = _I + ', tenant=~"$tenant"'


def _by_name(what: str, labels: str) -> tuple[Panel, ...]:
    """Return the panels that adapters and tenants have alike."""
    series = f"loraplex_{what}"
    legend = f"{{{{{what}}}}}"

    def named(column: str) -> str:
        return total(f"{series}_{column}_total", what, labels)

    return (
        Panel(
            "Requests",
            f"Sequences by {what}; `other` is all that have no series of their own.",
            "reqps",
            one(named("requests"), legend),
            is_stacked=True,
        ),
        Panel(
            "Tokens generated",
            f"By {what}.",
            "short",
            one(named("generated_tokens"), legend),
            is_stacked=True,
        ),
        Panel(
            "Prompt tokens",
            f"By {what}, each prompt once.",
            "short",
            one(named("prompt_tokens"), legend),
            is_stacked=True,
        ),
        Panel(
            "Time to first token (mean)",
            f"By {what}. One that stands out waits for its adapter, or has longer prompts.",
            "s",
            one(f"{named('ttft_seconds')} / ({named('first_tokens')} > 0)", legend),
            (2.5,),
        ),
        Panel(
            "Errors",
            "Share of sequences that failed, timed out, were refused or shed.",
            "percentunit",
            one(f"{named('errors')} / ({named('requests')} > 0)", legend),
            (0.01, 0.1),
        ),
        Panel(
            "Share of tokens, last hour",
            "Who uses it.",
            "short",
            one(
                f"topk(10, sum by ({what}) "
                f"(increase({series}_generated_tokens_total{{{labels}}}[1h])))",
                legend,
            ),
            kind="bargauge",
        ),
    )


ADAPTERS: Final = Dashboard(
    "loraplex-adapters",
    "loraplex / adapters",
    "Which adapters are used, where they are, and what bringing them in costs.",
    (_INSTANCE, _MODEL, _ADAPTER),
    (
        ("By adapter", _by_name("adapter", _A)),
        (
            "Tiers",
            (
                Panel(
                    "Where they are",
                    "Adapters in the pool, on their way, and in host memory.",
                    "short",
                    (
                        Query(f"sum(loraplex_resident_adapters{{{_I}}})", "pool"),
                        Query(f"sum(loraplex_loading_adapters{{{_I}}})", "loading"),
                        Query(f"sum(loraplex_host_adapters{{{_I}}})", "host"),
                    ),
                ),
                Panel(
                    "Where requests find theirs",
                    "host costs milliseconds, disk up to seconds.",
                    "reqps",
                    one(total("loraplex_adapter_wants_total", "tier"), "{{tier}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Found in the pool",
                    "Share of requests, 5 minutes. Low together with evictions is thrashing.",
                    "percentunit",
                    one(f"loraplex:adapter_pool_hit_ratio:rate5m{{{_I}}}", "{{instance}}"),
                ),
                Panel(
                    "Load time (p95)",
                    "Of one load into the pool, by where it came from, without queueing.",
                    "s",
                    one(
                        "histogram_quantile(0.95, "
                        + total("loraplex_adapter_load_duration_seconds_bucket", "tier, le")
                        + ")",
                        "{{tier}}",
                    ),
                    (0.5, 2),
                ),
                Panel(
                    "Waiting for an adapter (p95)",
                    "What requests with an adapter wait for nothing else than it.",
                    "s",
                    quantiles("loraplex_request_adapter_wait_seconds")[1:2],
                    (0.5, 2),
                ),
                Panel(
                    "Loads, prefetches, failures",
                    "A failure fails the requests that want the adapter: the log names it.",
                    "reqps",
                    (
                        Query(total("loraplex_adapter_loads_total"), "loads"),
                        Query(total("loraplex_adapter_prefetches_total"), "prefetches"),
                        Query(total("loraplex_adapter_load_failures_total"), "failures"),
                    ),
                ),
                Panel(
                    "Evictions by cause",
                    "kv: sequences took the pages. adapter: another adapter. unused: by policy.",
                    "reqps",
                    one(total("loraplex_adapter_evictions_total", "cause"), "{{cause}}"),
                    is_stacked=True,
                ),
                Panel(
                    "Distinct adapters of a step",
                    "How mixed the batch is.",
                    "short",
                    quantiles("loraplex_step_adapters"),
                ),
                Panel(
                    "Room",
                    "Adapters of the present mean size that the pool can hold, and those in use.",
                    "short",
                    (
                        Query(f"sum(vllm:max_gpu_lora_adapters{{{_VLLM}}})", "room"),
                        Query(f"sum(loraplex_running_adapters{{{_I}}})", "running"),
                        Query(f"sum(loraplex_waiting_adapters{{{_I}}})", "waited for"),
                    ),
                ),
            ),
        ),
        (
            "Busiest adapters",
            (
                Panel(
                    "Loaded",
                    "The busiest adapters that are in the pool (gpu) or in host memory (cpu).",
                    "short",
                    one(
                        "sum by (adapter_name, level, rank, pinned) "
                        f'(vllm:lora_adapter_loaded{{{_I}, adapter_name=~"$adapter"}})'
                    ),
                    kind="table",
                    width=24,
                ),
            ),
        ),
    ),
)

MEMORY: Final = Dashboard(
    "loraplex-memory",
    "loraplex / memory",
    "Who holds the pool's pages, and what happens when they run out.",
    (_INSTANCE, _MODEL),
    (
        (
            "Pool",
            (
                Panel(
                    "Pages by use",
                    "prefix_idle and adapters nobody runs with leave when somebody needs pages, "
                    "so little `free` is no problem by itself.",
                    "short",
                    one(f"sum by (use) (loraplex_pool_pages{{{_I}}})", "{{use}}"),
                    is_stacked=True,
                    width=16,
                ),
                Panel(
                    "In use by sequences",
                    "Share of pages that running sequences hold. At 1 the youngest give way.",
                    "percentunit",
                    one(f"loraplex:pool_in_use_ratio{{{_I}}}", "{{instance}}"),
                    (0.8, 0.95),
                ),
                Panel(
                    "As routers see it",
                    "vllm:kv_cache_usage_perc: what is not available, 0 to 1.",
                    "percentunit",
                    one(f"vllm:kv_cache_usage_perc{{{_VLLM}}}", "{{instance}}"),
                    (0.8, 0.95),
                ),
                Panel(
                    "Preemptions",
                    "Sequences that gave back their pages and compute again. Raise pool_bytes or "
                    "lower max_running.",
                    "reqps",
                    one(total("vllm:num_preemptions_total", "instance", _VLLM), "{{instance}}"),
                    (0.1,),
                ),
                Panel(
                    "Pages of the pool",
                    "The size of each pool.",
                    "short",
                    one(f"loraplex:pool_pages:sum{{{_I}}}", "{{instance}}"),
                    kind="stat",
                ),
            ),
        ),
        (
            "Prefix cache",
            (
                Panel(
                    "Hit ratio",
                    "Share of prompt tokens that need not be computed, 5 minutes.",
                    "percentunit",
                    one(f"loraplex:prefix_hit_ratio:rate5m{{{_I}}}", "{{instance}}"),
                ),
                Panel(
                    "Tokens looked for and found",
                    "Of prompts, at their first admission.",
                    "short",
                    (
                        Query(total("vllm:prefix_cache_queries_total", "", _VLLM), "looked for"),
                        Query(total("vllm:prefix_cache_hits_total", "", _VLLM), "found"),
                    ),
                ),
                Panel(
                    "Pages given up",
                    "By the prefix cache, for somebody who needed them.",
                    "short",
                    one(total("loraplex_prefix_evictions_total", "instance"), "{{instance}}"),
                ),
            ),
        ),
        (
            "Host memory",
            (
                Panel(
                    "Arena",
                    "Host memory that packed adapters take, and what there is.",
                    "bytes",
                    (
                        Query(f"sum(loraplex_host_bytes{{{_I}}})", "used"),
                        Query(f"sum(loraplex_host_capacity_bytes{{{_I}}})", "capacity"),
                    ),
                ),
                Panel(
                    "Adapters in it",
                    "Loading one of them costs a copy only.",
                    "short",
                    one(f"vllm:num_cpu_loaded_lora_adapters{{{_VLLM}}}", "{{instance}}"),
                ),
                Panel(
                    "Loads that it served",
                    "Adapters found there when wanted, a second.",
                    "reqps",
                    one(total("loraplex_adapter_host_hits_total", "instance"), "{{instance}}"),
                ),
            ),
        ),
    ),
)

TENANTS: Final = Dashboard(
    "loraplex-tenants",
    "loraplex / tenants",
    "Who uses the service, who is limited, and whether shares are fair.",
    (_INSTANCE, _TENANT),
    (
        ("By tenant", _by_name("tenant", _T)),
        (
            "Fairness",
            (
                Panel(
                    "Spread of service",
                    "Weighted tokens between the most and the least served tenant that waits. "
                    "Bounded while all have work (theorem 4.4 of the VTC paper); growth without "
                    "end would be a bug.",
                    "short",
                    one(f"loraplex_fair_service_spread{{{_I}}}", "{{instance}}"),
                ),
                Panel(
                    "Tenants that wait",
                    "Clients of the fair queue with something in it.",
                    "short",
                    one(f"loraplex_fair_clients{{{_I}}}", "{{instance}}"),
                ),
                Panel(
                    "Limited",
                    "429s of tenants' own limits: raise them or talk to the tenant.",
                    "reqps",
                    one(
                        total(
                            "loraplex_requests_rejected_total",
                            "reason",
                            _I + ', reason=~"tenant_queue_full|quota_exceeded"',
                        ),
                        "{{reason}}",
                    ),
                ),
            ),
        ),
    ),
)

DASHBOARDS: Final = (OVERVIEW, ADAPTERS, MEMORY, TENANTS)


def written(dashboard: Dashboard) -> str:
    """Return a dashboard's file."""
    return json.dumps(dashboard.to_json(), indent=2) + "\n"


if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        path = FOLDER / f"{dashboard.uid.removeprefix('loraplex-')}.json"
        path.write_text(written(dashboard), encoding="utf-8")
