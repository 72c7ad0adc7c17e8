"""Is it well, how fast is it, and what is it doing?"""

from __future__ import annotations

from typing import Final

from dashboard import Dashboard, Panel, Query
from queries import INSTANCE, MODEL, OF_INSTANCE, OF_MODEL, mean, one, quantiles, rate, total

OVERVIEW: Final = Dashboard(
    "loraplex-overview",
    "loraplex / overview",
    "Is it well, how fast is it, and what is it doing?",
    (INSTANCE, MODEL),
    (
        (
            "Now",
            (
                Panel(
                    "Engines ready",
                    "Servers whose engine serves. Fewer than there are servers: see the alert "
                    "LoraplexEngineNotReady.",
                    "short",
                    one(f"sum(loraplex_engine_ready{{{OF_INSTANCE}}})"),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Running",
                    "Sequences in the running batches.",
                    "short",
                    one(f"sum(loraplex_requests_running{{{OF_INSTANCE}}})"),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Waiting",
                    "Sequences that wait for pages or an adapter. If it only grows, add replicas.",
                    "short",
                    one(f"sum(loraplex_requests_waiting{{{OF_INSTANCE}}})"),
                    (1, 100),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Errors",
                    "Share of sequences of the last 5 minutes that failed, timed out or were shed.",
                    "percentunit",
                    one(f"max(loraplex:request_errors:ratio_rate5m{{{OF_INSTANCE}}})"),
                    (0.01, 0.144),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Slow first tokens",
                    "Share of first tokens of the last 5 minutes that took over 2.5 s.",
                    "percentunit",
                    one(f"max(loraplex:slow_first_tokens:ratio_rate5m{{{OF_INSTANCE}}})"),
                    (0.05, 0.5),
                    kind="stat",
                    width=4,
                    height=4,
                ),
                Panel(
                    "Engine restarts, 1 h",
                    "Deaths of engine processes. Each fails all running requests: see the log.",
                    "short",
                    one(f"sum(increase(loraplex_engine_restarts_total{{{OF_INSTANCE}}}[1h]))"),
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
                        Query(total("vllm:generation_tokens_total", "", OF_MODEL), "generated"),
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
                        Query(mean("vllm:request_queue_time_seconds", "", OF_MODEL), "queue"),
                        Query(mean("loraplex_request_adapter_wait_seconds", ""), "adapter"),
                        Query(mean("vllm:request_prefill_time_seconds", "", OF_MODEL), "prefill"),
                        Query(mean("vllm:request_decode_time_seconds", "", OF_MODEL), "decode"),
                    ),
                ),
                Panel(
                    "Queue (p95)",
                    "Before the first step, without waiting for an adapter alone.",
                    "s",
                    quantiles("vllm:request_queue_time_seconds", OF_MODEL)[1:2],
                    (1.0,),
                ),
                Panel(
                    "Lengths (mean)",
                    "Tokens of prompts and answers: what changed when latency did?",
                    "short",
                    (
                        Query(mean("vllm:request_prompt_tokens", "", OF_MODEL), "prompt"),
                        Query(mean("vllm:request_generation_tokens", "", OF_MODEL), "answer"),
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
                    quantiles("vllm:iteration_tokens_total", OF_MODEL),
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
                        Query(f"sum(loraplex_http_requests_open{{{OF_INSTANCE}}})", "requests"),
                        Query(f"sum(loraplex_sse_streams_open{{{OF_INSTANCE}}})", "streams"),
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
                    one(f"process_resident_memory_bytes{{{OF_INSTANCE}}}", "{{instance}}"),
                ),
                Panel(
                    "File descriptors",
                    "Share of those it may have; connections are what takes them.",
                    "percentunit",
                    one(
                        f"process_open_fds{{{OF_INSTANCE}}} / process_max_fds{{{OF_INSTANCE}}}",
                        "{{instance}}",
                    ),
                    (0.7, 0.9),
                ),
                Panel(
                    "Age of the registry's news",
                    "Of servers that share a registry: since each last followed what others "
                    "changed. Above registry_outage_s, names and keys count no more.",
                    "s",
                    one(f"loraplex_registry_age_seconds{{{OF_INSTANCE}}}", "{{instance}}"),
                    (2, 30),
                ),
            ),
        ),
    ),
)
